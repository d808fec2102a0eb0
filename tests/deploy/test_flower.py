"""Federations of real Flower processes, encrypted and with a key each: the same results, whatever goes wrong."""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from fedloom.data.federation import Federation
from fedloom.data.settings import DataSettings
from fedloom.data.tokens import Tokenizer
from fedloom.deploy.site import SiteSettings, own_data
from fedloom.launch import run_recipe
from fedloom.recipe import to_yaml
from fedloom.run.checkpoint import state_sha256
from fedloom.run.loop import advance, begin
from fedloom.run.session import build
from fedloom.run.settings import Recipe

pytest.importorskip("flwr", reason="the extra `flower` is not installed")
pytestmark = [pytest.mark.flower, pytest.mark.timeout(1500)]
Make = Callable[..., Recipe]
SITES = ("alba", "brno", "cork")
MARK = "FEDLOOM_TEST"
PATIENCE = 600.0
"""Seconds for what takes ten on a machine that has nothing else to do."""


def sha(summary: Any) -> str:
    return str(summary["state_sha256"])


def of_flower(process: psutil.Process, words: str) -> list[psutil.Process]:
    """Return the processes below one whose command has all the words, without their guards."""
    found = []
    for child in process.children(recursive=True):
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if "guard.py" not in command and all(word in command for word in words.split()):
            found.append(child)
    return found


def until(true: Callable[[], Any], process: "subprocess.Popen[str] | None" = None) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < end, "took too long"
        assert process is None or process.poll() is None, "ended early"
        time.sleep(0.1)
    return found


def round_of(folder: Path) -> int:
    """Return the last round in metrics.jsonl; -1 before any."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["round"]) if lines else -1


def reached(folder: Path, number: int) -> bool:
    return round_of(folder) >= number


def fedloom(*words: str, log: Path) -> "subprocess.Popen[str]":
    with open(log, "a") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "fedloom.cli", *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
        )


@pytest.fixture
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail where a test leaves a process behind; kill it in any case."""
    # Inherited by all that a test starts: other tests may run beside it.
    monkeypatch.setenv(MARK, str(tmp_path))
    yield
    mine = [p for p in psutil.process_iter() if p.pid != os.getpid() and _of(p, str(tmp_path))]
    _, left = psutil.wait_procs(mine, timeout=15)
    names = [" ".join(p.cmdline()[:6]) for p in left if p.is_running()]
    for process in left:
        process.kill()
    assert not names


def _of(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except psutil.Error:
        return False


def in_one_process(recipe: Recipe, folder: Path) -> str:
    """Return the hash of a run over the sites' own data, each cut as its site cuts it."""

    def own(settings: DataSettings, tokenizer: Tokenizer) -> Federation:
        source = Path(settings.source)
        parts = [
            own_data(SiteSettings(site, folder, source / f"{site}.jsonl"), settings, tokenizer)
            for site in SITES
        ]
        counts = {c: n for part in parts for c, n in part.manifest.clients.items()}
        return replace(
            parts[0],
            shards={c: shard for part in parts for c, shard in part.shards.items()},
            profiles={c: p for part in parts for c, p in part.profiles.items()},
            manifest=replace(parts[0].manifest, clients=counts),
        )

    session = build(recipe, folder, own=own)
    run = begin(recipe.algorithm, session.space.start(), recipe.run.seed)
    for _ in range(recipe.run.rounds):
        run, _, _ = advance(
            run,
            recipe.algorithm,
            session.engine,
            population=session.learners,
            sampler=recipe.cohort,
        )
    return state_sha256(run)


def test_a_run_on_flower_ends_with_the_same_bytes_as_in_process(
    recipe: Make, tmp_path: Path, nothing_left: None
):
    here = run_recipe(recipe(), tmp_path / "here")[""]
    there = run_recipe(recipe(engine={"flower": {"nodes": 2}}), tmp_path / "there")[""]
    assert sha(there) == sha(here)
    assert there["num_absent"] == 0
    assert there["upload_bytes"] == here["upload_bytes"]
    assert there["download_bytes"] == here["download_bytes"]


@pytest.mark.slow
def test_no_finished_round_is_lost_whatever_is_killed(
    recipe: Make, tmp_path: Path, nothing_left: None
):
    rounds = {"rounds": 5, "samples": 0}
    here = run_recipe(recipe(run=rounds), tmp_path / "here")[""]
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(run=rounds, engine={"flower": {"nodes": 2}})))
    out, log = tmp_path / "there", tmp_path / "log"
    process = fedloom("run", str(file), "--out", str(out), log=log)
    try:
        server = psutil.Process(process.pid)
        for at, words in ((1, "flower-supernode node-1"), (2, "flower-superlink")):
            until(partial(reached, out, at), process)
            for victim in of_flower(server, words):
                victim.kill()
        until(lambda: round_of(out) >= 3, process)
    finally:
        process.kill()
        process.wait()
    done = round_of(out)
    assert "making a new link" in log.read_text()
    again = fedloom("resume", str(out), log=log)
    assert again.wait(PATIENCE) == 0, log.read_text()
    assert f"going on after round {done}" in log.read_text()
    there = json.loads((out / "summary.json").read_text())
    assert there["num_absent"] == 0, log.read_text()
    assert sha(there) == sha(here)


@pytest.mark.slow
def test_a_killed_worker_is_an_absence_with_its_site_and_works_in_the_next_round(
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
    process = fedloom("run", str(file), "--out", str(out), log=log)
    try:
        server = psutil.Process(process.pid)
        until(lambda: round_of(out) >= 0, process)
        (worker,) = until(lambda: of_flower(server, "fedloom.deploy.worker"), process)
        busy = worker.cpu_times().user
        until(lambda: worker.cpu_times().user > busy + 3, process)
        worker.kill()
        until(lambda: round_of(out) >= 1, process)
        assert "node-0: its worker died and is started again" in log.read_text()
        lines = (out / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[1])["comm/num_absent"] == 3
        until(lambda: of_flower(server, "fedloom.deploy.worker"), process)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130


@pytest.mark.slow
def test_sites_join_over_a_port_that_shows_nothing_else(
    recipe: Make, tree: dict[str, Any], tmp_path: Path, nothing_left: None
):
    from fedloom.engines.flower.keys import Keys
    from fedloom.engines.flower.processes import free_port

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    keys, port = Keys(tmp_path / "keys"), free_port()
    keys.init([])
    out, log, address = tmp_path / "out", tmp_path / "serve.log", f"127.0.0.1:{port}"
    sites = {site: keys.add(site) for site in SITES}
    serve = fedloom(
        *("serve", str(file), "--listen", address, "--keys", str(keys.folder), "--out", str(out)),
        log=log,
    )
    joined = []
    try:
        until(lambda: log.exists() and "listening on" in log.read_text(), serve)
        _refuses_all_but_the_fleet(keys.ca, port)
        stranger = Keys(tmp_path / "other")
        stranger.init([])
        unknown = _visit("alba", stranger.add("alba"), tree, tmp_path, address, "wrong_authority")
        assert unknown.wait(PATIENCE) == 2
        assert "does not show a certificate of" in (tmp_path / "wrong_authority.log").read_text()
        late = keys.add("late")
        unregistered = _visit("late", late, tree, tmp_path, address, "unregistered", data="alba")
        assert unregistered.wait(PATIENCE) == 2
        assert "does not take the key in" in (tmp_path / "unregistered.log").read_text()
        joined = [_visit(s, folder, tree, tmp_path, address, s) for s, folder in sites.items()]
        assert serve.wait(PATIENCE) == 0, log.read_text()
        assert [site.wait(PATIENCE) for site in joined] == [0, 0, 0]
    finally:
        for process in (serve, *joined):
            process.terminate()
            process.wait()
    there = json.loads((out / "summary.json").read_text())
    assert sha(there) == in_one_process(recipe(), tmp_path / "here")
    shown = subprocess.run(
        [sys.executable, "-m", "fedloom.cli", "status", str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "brno" in shown.stdout
    assert "round 2 finished" in shown.stdout


def _visit(
    name: str, keys: Path, tree: Any, folder: Path, address: str, log: str, data: str = ""
) -> "subprocess.Popen[str]":
    text = Path(tree["data"]["source"]) / f"{data or name}.jsonl"
    words = ("join", address, "--data", str(text), "--name", name, "--keys", str(keys))
    return fedloom(*words, "--folder", str(folder / f"site-{log}"), log=folder / f"{log}.log")


def _refuses_all_but_the_fleet(ca: Path, port: int) -> None:
    """With the CA file alone: no listing, no registering, no run, no run's end, no pages, and no way round."""
    context = ssl.create_default_context(cafile=str(ca))
    for path in (
        "/v1/control/list-runs",
        "/v1/control/list-nodes",
        "/v1/control/register-node",
        "/v1/control/start-run",
        "/v1/control/stop-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet/pull-messages/../../control/list-nodes",
        "//v1/fleet/pull-messages",
        "/docs",
        "/health",
    ):
        for method in ("POST", "GET"):
            asked = urllib.request.Request(
                f"https://127.0.0.1:{port}{path}", data=b"" if method == "POST" else None
            )
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(asked, context=context, timeout=30)
            assert refused.value.code == 403
    # A fleet path without a site's key is the SuperLink's to refuse.
    asked = urllib.request.Request(f"https://127.0.0.1:{port}/v1/fleet/activate-node", data=b"")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked, context=context, timeout=30)
    assert refused.value.code >= 400


class Counting:
    """A wire between a site and the server that counts what passes."""

    def __init__(self, target: int) -> None:
        self.target, self.up, self.down = target, 0, 0
        self.door = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.door.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                site, _ = self.door.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            for pair in ((site, server, "up"), (server, site, "down")):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(1 << 18):
                if way == "up":
                    self.up += len(data)
                else:
                    self.down += len(data)
                target.sendall(data)


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "least"), [(96, 1e6), (680, 50e6)])
def test_reported_bytes_are_those_on_the_wire(
    hidden: int,
    least: float,
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    tree: dict[str, Any],
    tmp_path: Path,
    nothing_left: None,
):
    from fedloom.engines.flower.keys import Keys
    from fedloom.engines.flower.processes import free_port

    folder = tmp_path / "model"
    model = tiny_llama(vocab=len(tiny_tokenizer), hidden=hidden, layers=4 if hidden > 500 else 3)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    file = tmp_path / "recipe.yaml"
    whole = {"model": {"name": str(folder)}, "tune": {"space": "full"}}
    file.write_text(yaml.safe_dump({**tree, **whole, "run": {"rounds": 1, "samples": 0}}))
    keys, port = Keys(tmp_path / "keys"), free_port()
    keys.init([])
    own = keys.add("alba")
    out, log = tmp_path / "out", tmp_path / "serve.log"
    address = f"127.0.0.1:{port}"
    serve = fedloom(
        *("serve", str(file), "--listen", address, "--keys", str(keys.folder), "--out", str(out)),
        log=log,
    )
    until(lambda: log.exists() and "listening on" in log.read_text(), serve)
    wire, began = Counting(port), time.monotonic()
    joined = _visit("alba", own, tree, tmp_path, f"127.0.0.1:{wire.port}", "alba")
    try:
        assert serve.wait(PATIENCE) == 0, log.read_text()
        assert joined.wait(PATIENCE) == 0
    finally:
        for process in (serve, joined):
            process.terminate()
            process.wait()
        wire.door.close()
    told = json.loads((out / "status.json").read_text())["sites"]["alba"]
    # Letters beside the payload, polls and handshakes: by letter, and by second.
    fixed = 5 * 30_000 + 500 * (time.monotonic() - began)
    ways = {
        "up": (wire.up, told["upload_bytes"]),
        "down": (wire.down, told["download_bytes"]),
    }
    for way, (counted, reported) in ways.items():
        said = f"{way}: {counted} counted, {reported} reported, {fixed:.0f} allowed beside 1 %"
        (tmp_path / f"{way}.txt").write_text(said)
        assert reported <= counted <= 1.01 * reported + fixed, said
    assert told["upload_bytes"] > least
