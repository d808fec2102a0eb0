"""Every command of docs/deploy.md is run, on this machine, encrypted and with a key each: the bytes are those of one process."""

import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.deploy.conftest import KINDS, SITES, in_one_process, write_pairs

from fedloom import experiment
from fedloom.recipe import build_recipe, load_recipe

pytest.importorskip("flwr", reason="the extra `flower` is not installed")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
pytestmark = [pytest.mark.flower, pytest.mark.timeout(900)]
SMALL = (
    *("data.num_examples=240", "local.steps=1", "local.batched=off", "local.kernels=torch"),
    *("run.rounds=2", "run.samples=0", "run.baselines=[]"),
    *("evaluation.every=0", "evaluation.generate=false", "evaluation.validation=false"),
    "evaluation.max_examples=1",
)

OUTSIDER = """[project]
name = "outsider"
version = "1.0.0"
description = "Code that nobody asked for."
license = { text = "Apache-2.0" }
dependencies = []
[tool.flwr.app]
publisher = "outsider"
[tool.flwr.app.components]
serverapp = "outsider:server_app"
clientapp = "outsider:client_app"
"""


def commands() -> Iterator[list[str]]:
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S):
        yield from (shlex.split(line) for line in block.splitlines() if line.strip())


def of(verb: str, *, dry: bool = False) -> list[list[str]]:
    return [c for c in commands() if c[1] == verb and ("--dry-run" in c) == dry]


def run(words: list[str], folder: Path, port: int = 0) -> "subprocess.Popen[str]":
    """Start a command of the page, its names and ports this machine's."""
    text = "\n".join(words[1:]).replace("server.example:9443", f"127.0.0.1:{port}")
    text = text.replace("0.0.0.0:9443\n--public", f"127.0.0.1:{port}")
    return subprocess.Popen(
        [sys.executable, "-m", "fedloom.cli", *text.split("\n")],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end_of(process: "subprocess.Popen[str]") -> str:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def test_the_page_has_the_commands_that_are_run():
    assert [c[1] for c in commands()] == [
        *("run", "keys", "keys", "keys", "keys", "serve"),
        *("join", "join", "join", "join", "status", "run"),
    ]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Return the summary of the page's run in one process."""
    folder = tmp_path_factory.mktemp("page") / "here"
    return experiment.run(load_recipe("quickstart", SMALL), folder).summary


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["flower", "ray"])
def test_other_engines_end_with_the_bytes_of_one_process(
    engine: str,
    here: Mapping[str, Any],
    tmp_path: Path,
    nothing_left: None,
    monkeypatch: pytest.MonkeyPatch,
):
    # Ray's processes give way to all others, which beside other tests is for minutes.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    pytest.importorskip(
        {"flower": "flwr"}.get(engine, engine), reason=f"the extra `{engine}` is not installed"
    )
    (words,) = [c for c in of("run") if f"engine={engine}" in c]
    end_of(run([*words, *SMALL], tmp_path))
    there = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    for name in ("state_sha256", "upload_bytes", "download_bytes", "num_absent"):
        assert there[name] == here[name]


@pytest.mark.slow
def test_three_sites_from_nothing(tree: dict[str, Any], tmp_path: Path, nothing_left: None):
    """FedBiscuit, whose clients are sent several selectors of answers, and are put to them by what they say of each."""
    from fedloom.engines.flower.processes import free_port

    port, chosen = free_port(), {**tree, **KINDS["fedbiscuit"], "name": "recipe"}
    recipe = build_recipe(chosen)
    write_pairs(recipe)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(chosen))
    for words in of("keys"):
        end_of(run(words, tmp_path))
    for site in SITES:
        shutil.copytree(tmp_path / "keys" / "sites" / site, tmp_path / site)
        shutil.copy(Path(tree["data"]["source"]) / f"{site}.jsonl", tmp_path)
    (dry,), (serve,) = of("join", dry=True), of("serve")
    assert "the whole message" in end_of(run(dry, tmp_path, port))
    server = run(serve, tmp_path, port)
    joined = []
    try:
        _refuses_all_but_the_fleet(tmp_path / "alba" / "ca.crt", port)
        joined = [run(words, tmp_path, port) for words in of("join")]
        for process in (server, *joined):
            end_of(process)
    finally:
        for process in (server, *joined):
            process.terminate()
            process.wait()
    (status,) = of("status")
    assert f"round {recipe.run.rounds} finished" in end_of(run(status, tmp_path))
    out = tmp_path / "runs" / "recipe"
    assert (out / "report.html").exists()
    there = json.loads((out / "summary.json").read_text())
    assert there["state_sha256"] == in_one_process(recipe, tmp_path / "here")


def _refuses_all_but_the_fleet(ca: Path, port: int) -> None:
    """With the CA file alone: no listing, no registering, no run, no run's end, no pages, and no way round."""
    context = ssl.create_default_context(cafile=str(ca))
    assert _code(context, port, "/health", "GET", patient=True) == 403
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
    ):
        for method in ("POST", "GET"):
            assert _code(context, port, path, method) == 403
    home = ca.parent / "outsider"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink.it]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{ca}"\n'
    )
    (home / "pyproject.toml").write_text(OUTSIDER)
    (home / "outsider.py").write_text("server_app = client_app = None\n")
    for words in (
        ["list", "it"],
        ["supernode", "list", "it"],
        ["supernode", "register", str(ca.parent / "node.pub"), "it"],
        ["run", str(home), "it"],
    ):
        assert "403" in _flwr(words, home)
    # A fleet path without a site's key is the SuperLink's to refuse.
    assert 400 <= _code(context, port, "/v1/fleet/activate-node", "POST") < 500


def _flwr(words: list[str], home: Path) -> str:
    """Return what Flower's own command says where it fails."""
    environment = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(
        [str(Path(sys.executable).parent / "flwr"), *words],
        env={**os.environ, **environment, "FLWR_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    return done.stdout + done.stderr


def _code(
    context: ssl.SSLContext, port: int, path: str, method: str, *, patient: bool = False
) -> int:
    """Return the status of an answer; `patient` waits until somebody listens."""
    asked = urllib.request.Request(
        f"https://127.0.0.1:{port}{path}", data=b"" if method == "POST" else None
    )
    end = time.monotonic() + 300
    while True:
        try:
            return int(urllib.request.urlopen(asked, context=context, timeout=30).status)
        except urllib.error.HTTPError as refused:
            return refused.code
        except urllib.error.URLError:
            if not patient or time.monotonic() > end:
                raise
            time.sleep(0.5)
