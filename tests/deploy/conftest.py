"""A recipe of three sites and two rounds, and what every test of real processes needs."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedloom.recipe import build_recipe
from fedloom.rounds.recipe_settings import Recipe

SITES = ("alba", "brno", "cork")
MARK = "FEDLOOM_TEST"


@pytest.fixture
def tree(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Return a recipe over a folder with one file a site; every sum has one order on every engine."""
    folder = tmp_path / "data"
    folder.mkdir()
    for at, site in enumerate(SITES):
        rows = [
            {"prompt": f"say {i}", "completion": f"{i * (at + 2)}", "language": site[:2], "id": "7"}
            for i in range(24)
        ]
        (folder / f"{site}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return {
        "name": "three",
        "algorithm": "fedavg",
        "model": {"name": str(tiny_folder)},
        "tune": {"lora": {"rank": 2, "targets": ["q_proj"]}},
        "data": {"source": str(folder), "partition": {"natural": {"by": "file"}}, "max_length": 64},
        "local": {
            "optimizer": "sgd",
            "lr": 0.1,
            "steps": 1,
            "batch_size": 2,
            "batched": "off",
            "kernels": "torch",
        },
        "evaluation": {"every": 0, "generate": False, "validation": False},
        "run": {"rounds": 2, "samples": 0},
    }


@pytest.fixture
def recipe(tree: dict[str, Any]) -> Callable[..., Recipe]:
    """Return a maker of that recipe; keywords are merged over its sections."""

    def make(**sections: Any) -> Recipe:
        merged = dict(tree)
        for name, value in sections.items():
            old = tree.get(name)
            both = isinstance(value, dict) and isinstance(old, dict)
            merged[name] = {**(old or {}), **value} if both else value
        return build_recipe(merged)

    return make


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
