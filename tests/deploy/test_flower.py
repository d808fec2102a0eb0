"""Something breaks in a federation of real Flower processes, encrypted and with a key each."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.deploy.conftest import (
    KINDS,
    SITES,
    in_one_process,
    played_here,
    seen_of,
    write_pairs,
)

from fedloom import experiment
from fedloom.deploy.listening import Listening, check_free
from fedloom.models.build import load_base
from fedloom.models.emulator import cut
from fedloom.recipe import build_recipe
from fedloom.recipe_text import to_yaml
from fedloom.rounds.recipe_settings import Recipe

pytest.importorskip("flwr", reason="the extra `flower` is not installed")
pytestmark = [pytest.mark.flower, pytest.mark.timeout(900)]
Make = Callable[..., Recipe]
# Where tests run in the background, a shell has told everything they start to ignore Ctrl-C.
LISTENS = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " from fedloom.cli import main; main()"
)
PATIENCE = 400.0
"""Seconds for what takes ten on a machine that has nothing else to do."""


def worker_below(process: psutil.Process) -> psutil.Process | None:
    for child in process.children(recursive=True):
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if "guard.py" not in command and "fedloom.deploy.worker" in command:
            return child
    return None


def until(true: Callable[[], Any], process: "subprocess.Popen[Any]") -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < end, "took too long"
        assert process.poll() is None, "ended early"
        time.sleep(0.1)
    return found


def round_of(folder: Path) -> int:
    """Return the last round in metrics.jsonl; -1 before any."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["round"]) if lines else -1


@pytest.mark.slow
def test_a_killed_worker_is_an_absence_with_its_site_and_is_started_again(
    recipe: Make, tmp_path: Path, nothing_left: None
):
    # Long enough at work for the kill to come in the middle.
    file = tmp_path / "recipe.yaml"
    slow = recipe(
        run={"rounds": 2, "samples": 0},
        local={"steps": 4000},
        engine={"flower": {"nodes": 1}},
        evaluation={"max_examples": 1},
    )
    file.write_text(to_yaml(slow))
    out, log = tmp_path / "out", tmp_path / "log"
    with open(log, "w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", LISTENS, "run", str(file), "--out", str(out)],
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
        )
    try:
        server = psutil.Process(process.pid)
        until(lambda: round_of(out) >= 0, process)
        worker = until(lambda: worker_below(server), process)
        busy = worker.cpu_times().user
        until(lambda: worker.cpu_times().user > busy + 2, process)
        worker.kill()
        until(lambda: round_of(out) >= 1, process)
        assert "node-0: its worker died and is started again" in log.read_text()
        lines = (out / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[1])["comm/num_absent"] == 3
        until(lambda: worker_below(server), process)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130


@pytest.mark.slow
def test_nodes_of_a_run_find_the_algorithm_that_its_recipe_names(
    recipe: Make, lab: Path, tmp_path: Path, nothing_left: None
):
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    named = recipe(algorithm="my_lab.methods:MyMethod", engine={"flower": {"nodes": 1}})
    file.write_text(to_yaml(named))
    # In this program's path, not in the environment that its processes inherit.
    code = f"import sys; sys.path.insert(0, {str(lab.parent)!r}); {LISTENS}"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(file), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert round_of(out) == 2
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["comm/num_absent"] == 0


DIES = (
    "import os, signal; from fedloom.rounds.checkpoint import Checkpoints; save = Checkpoints.save\n"
    "def late(self, run, *rest):\n"
    "    if run.number == {round}: os.kill(os.getpid(), signal.SIGKILL)\n"
    "    save(self, run, *rest)\n"
    "Checkpoints.save = late\n"
    "from fedloom.cli import main; main()"
)
"""A server that is killed when a round is played, aligned and all, but not on the disk."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "fedbiot"])
def test_three_sites_whose_server_was_killed_end_with_the_bytes_of_one_process(
    kind: str, tree: dict[str, Any], whole: Path, tmp_path: Path, nothing_left: None
):
    from fedloom.engines.flower.processes import free_port

    base = {**tree, "model": {"name": str(whole)}, **KINDS[kind]}
    made, port, out = build_recipe(base), free_port(), tmp_path / "run"
    if kind == "dpo":
        write_pairs(made)
    asked = build_recipe({**base, "engine": {"flower": {"nodes": 0}}})
    serve, *joins = commands(asked, tmp_path, port)
    program = ("-m", "fedloom.cli")
    dies = DIES.format(round=made.run.rounds)
    server = subprocess.Popen([sys.executable, "-c", dies, *serve], text=True)
    sites = [subprocess.Popen([sys.executable, *program, *join], text=True) for join in joins]
    try:
        assert server.wait(PATIENCE) == -signal.SIGKILL
        assert round_of(out) == made.run.rounds - 1
        # What it had started ends by itself, and with it whoever listens.
        until(lambda: is_free(port), sites[0])
        server = subprocess.Popen([sys.executable, *program, *serve], text=True)
        assert [process.wait(PATIENCE) for process in (server, *sites)] == [0] * 4
    finally:
        for process in (server, *sites):
            process.terminate()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["num_clients"], summary["num_absent"]) == (3, 0)
    assert summary["state_sha256"] == in_one_process(made, tmp_path / "here")
    if kind == "fedbiot":
        model = load_base(made.model).model
        layers = {*cut(8, left=1, right=1, drop=0.5, rule="floor").layers}
        for site in SITES:
            held = [p.read_bytes() for p in (tmp_path / "sites" / site).rglob("*") if p.is_file()]
            assert seen_of(model, held) == layers


@pytest.mark.slow
def test_three_sites_that_nobody_waits_for_answer_as_they_are_done(
    recipe: Make, tmp_path: Path, nothing_left: None
):
    from fedloom.engines.flower.processes import free_port

    asked = recipe(
        engine={"flower": {"nodes": 0}},
        run={"rounds": 3, "samples": 0, "mode": {"buffered": {"size": 2}}},
    )
    serve, *joins = commands(asked, tmp_path, free_port())
    program = [sys.executable, "-m", "fedloom.cli"]
    server, *sites = [subprocess.Popen([*program, *words], text=True) for words in (serve, *joins)]
    try:
        assert [process.wait(PATIENCE) for process in (server, *sites)] == [0] * 4
    finally:
        for process in (server, *sites):
            process.terminate()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["comm/num_replies"] for line in lines[1:]] == [2, 2, 2]
    assert [line["comm/num_training"] for line in lines[1:]] == [1, 1, 1]
    # Whoever trained on while the others' answers were taken up is late.
    assert max(line["server/max_staleness"] for line in lines[1:]) >= 1
    assert lines[-1]["test/num_examples"] == lines[0]["test/num_examples"]


def test_a_server_that_waits_for_more_answers_than_there_are_sites_is_refused(
    recipe: Make, tmp_path: Path
):
    mode = {"buffered": {"size": 4}}
    asked = recipe(engine={"flower": {"nodes": 0}}, run={"rounds": 3, "samples": 0, "mode": mode})
    commands(asked, tmp_path, 1)
    listening = Listening("127.0.0.1", 1, tmp_path / "keys")
    with pytest.raises(
        ValueError, match=r"size 4 waits for so many different sites, and .*keys has 3: lower it"
    ):
        experiment.run(asked, tmp_path / "run", listening=listening)


@pytest.mark.slow
def test_a_site_whose_client_is_split_over_processes_trains_beside_others_that_are_not(
    recipe: Make, tmp_path: Path, nothing_left: None
):
    """Up to rounding the model is that of one process."""
    from fedloom.engines.flower.processes import free_port

    local = {"kernels": "auto", "optimizer": "sgd", "lr": 5.0, "steps": 2, "batch_size": 2}
    tune = {"lora": {"rank": 2, "targets": ["q_proj"], "origin": "zero"}}
    made = recipe(local=local, tune=tune)
    served = recipe(local=local, tune=tune, engine={"flower": {"nodes": 0}})
    serve, *joins = commands(served, tmp_path, free_port())
    joins[-1] += ["--shards", "2"]
    programs = [
        subprocess.Popen([sys.executable, "-m", "fedloom.cli", *words]) for words in (serve, *joins)
    ]
    try:
        assert [process.wait(PATIENCE) for process in programs] == [0] * 4
    finally:
        for process in programs:
            process.terminate()
    out = tmp_path / "run"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["num_clients"], summary["num_absent"]) == (3, 0)
    here = played_here(made, tmp_path / "here").state.params
    there = load_file(out / "adapters" / "global" / "adapter_model.safetensors")
    assert len(there) == len(here)
    for name, tensor in here.items():
        assert torch.allclose(there[f"base_model.model.{name}"], tensor, rtol=0, atol=1e-5)
        assert float(tensor.abs().max()) > 1e-3


def commands(recipe: Recipe, folder: Path, port: int) -> list[list[str]]:
    """Return the words of a server and of its sites, whose recipe and keys are made in a folder."""
    from fedloom.engines.flower.keys import Keys

    file, keys, address = folder / "recipe.yaml", Keys(folder / "keys"), f"127.0.0.1:{port}"
    file.write_text(to_yaml(recipe))
    keys.init(())
    serve = ["serve", str(file), "--listen", address, "--keys", str(keys.folder)]
    joins = [
        [
            *("join", address, "--name", site, "--keys", str(keys.add(site))),
            *("--data", str(Path(recipe.data.source) / f"{site}.jsonl"), "--min-examples", "4"),
            *("--folder", str(folder / "sites" / site)),
        ]
        for site in SITES
    ]
    return [[*serve, "--out", str(folder / "run")], *joins]


def is_free(port: int) -> bool:
    try:
        check_free("127.0.0.1", port)
    except ValueError:
        return False
    return True
