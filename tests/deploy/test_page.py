"""Every command of docs/deploy.md is run, on this machine, with the page's three sites."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("flwr", reason="the extra `flower` is not installed")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
pytestmark = [pytest.mark.flower, pytest.mark.timeout(1500)]


def commands() -> Iterator[list[str]]:
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S):
        yield from (shlex.split(line) for line in block.splitlines() if line.strip())


def of(verb: str, *, dry: bool = False) -> list[list[str]]:
    return [c for c in commands() if c[1] == verb and ("--dry-run" in c) == dry]


def run(words: list[str], folder: Path, port: int) -> "subprocess.Popen[str]":
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


def test_the_page_has_the_commands_that_are_run():
    assert [c[1] for c in commands()] == [
        *("run", "keys", "keys", "keys", "keys", "serve"),
        *("join", "join", "join", "join", "status", "run"),
    ]


@pytest.mark.slow
def test_three_sites_from_nothing(tree: dict[str, Any], tmp_path: Path):
    from fedloom.engines.flower.processes import free_port

    port = free_port()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**tree, "name": "recipe"}))
    for words in of("keys"):
        process = run(words, tmp_path, port)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    for site in ("alba", "brno", "cork"):
        shutil.copytree(tmp_path / "keys" / "sites" / site, tmp_path / site)
        shutil.copy(Path(tree["data"]["source"]) / f"{site}.jsonl", tmp_path)
    (dry,) = of("join", dry=True)
    process = run(dry, tmp_path, port)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "the whole message" in said
    running = [run(words, tmp_path, port) for verb in ("serve", "join") for words in of(verb)]
    try:
        for process in running:
            said, _ = process.communicate(timeout=1200)
            assert process.returncode == 0, said
    finally:
        for process in running:
            process.terminate()
            process.wait()
    (status,) = of("status")
    process = run(status, tmp_path, port)
    said, _ = process.communicate(timeout=300)
    assert "round 2 finished" in said
    assert (tmp_path / "runs" / "recipe" / "report.html").exists()
