"""Something breaks in a federation of real Flower processes, encrypted and with a key each."""

import importlib.util
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

from fedloom.models.build import ModelSettings, load_base
from fedloom.recipe import to_yaml
from fedloom.rounds.recipe_settings import Recipe

pytest.importorskip("flwr", reason="the extra `flower` is not installed")
pytestmark = [pytest.mark.flower, pytest.mark.alone, pytest.mark.timeout(900)]
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


def until(true: Callable[[], Any], process: "subprocess.Popen[str]") -> Any:
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


@pytest.mark.slow
def test_three_sites_around_an_emulator_have_nothing_of_the_rest_on_their_disks(
    tmp_path: Path, nothing_left: None, monkeypatch: pytest.MonkeyPatch
):
    file = Path(__file__).parents[2] / "examples" / "three_sites.py"
    spec = importlib.util.spec_from_file_location("example_three_sites", file)
    assert spec
    assert spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    begin = example.start

    def start(*arguments: str, folder: Path) -> Any:
        named = ("fedbiot" if word == "quickstart" else word for word in arguments)
        return begin(*named, folder=folder)

    monkeypatch.setattr(example, "start", start)
    align = ("before=2", "steps=1", "batch_size=2", "public.num_examples=20")
    monkeypatch.setattr(
        example,
        "SETTINGS",
        [
            *("run.rounds=2", "run.samples=0", "local.steps=1", "data.partition=iid"),
            *("evaluation.generate=false", "evaluation.max_examples=2", "evaluation.every=0"),
            *(f"algorithm.fedbiot.{setting}" for setting in align),
        ],
    )
    example.federate(tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["num_clients"], summary["num_absent"]) == (3, 0)
    for site in example.SITES:
        held = [p.read_bytes() for p in (tmp_path / "sites" / site).rglob("*") if p.is_file()]
        found = [
            any(weight in file for file in held)
            for layer in load_base(ModelSettings()).model.model.layers
            for weight in [layer.mlp.up_proj.weight.flatten()[:64].numpy().tobytes()]
        ]
        # One of the two layers between those that learn.
        assert found == [True, True, False, True]
