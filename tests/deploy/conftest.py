"""A recipe of three sites and two rounds, and what every test of real processes needs."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from fedloom.deploy.site import all_own
from fedloom.deploy.site_settings import SiteSettings
from fedloom.recipe import build_recipe
from fedloom.rounds.checkpoint import state_sha256
from fedloom.rounds.emulation import stage_of
from fedloom.rounds.loop import Run, advance, begin
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Makers, build

SITES = ("alba", "brno", "cork")
MARK = "FEDLOOM_TEST"
ALIGN = {
    "public": {"source": "builtin:polyglot", "num_examples": 12},
    "before": 1,
    "steps": 1,
    "batch_size": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo"},
    "fedbiscuit": {
        "objective": {"selector": {"question": "{prompt} {a} {b} "}},
        "algorithm": [{"clustered": {"mode": {"balanced": {"num_clusters": 2}}}}, "fedavg"],
        "run": {"rounds": 3, "samples": 0},
    },
    "fedbiot": {
        "algorithm": [{"fedbiot": ALIGN}, "fedavg"],
        "tune": {
            "offsite": {"left": 1, "right": 1, "factors": 2, "adapter": {"lora": {"rank": 2}}}
        },
    },
}


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
def whole(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """Return the folder of a model of eight layers, of which sites may have some."""
    folder = tmp_path / "whole"
    tiny_llama(layers=8, vocab=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


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


def write_pairs(recipe: Recipe) -> None:
    """Put pairs of answers in the place of each site's rows."""
    for times, site in enumerate(SITES, 2):
        rows = [
            {"prompt": f"say {i}", "chosen": f"{i * times}", "rejected": f"{i * times + 1}."}
            for i in range(24)
        ]
        file = Path(recipe.data.source) / f"{site}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def seen_of(model: nn.Module, held: Iterable[bytes]) -> set[int]:
    """Return the numbers of a model's layers of which two neighbouring weights are somewhere in some bytes.

    Wherever they are in there, as float32, float16 or bfloat16.
    """
    found = [_pairs(each, 1, _BYTES) for each in {*held} if len(each) >= _BYTES]
    there = np.unique(np.concatenate(found))
    seen = set()
    for number, layer in enumerate(model.get_submodule("model.layers").children()):
        for name, weight in layer.named_parameters():
            if weight.dim() != 2 or "lora_" in name:
                continue
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                numbers = weight.detach().flatten().to(dtype).contiguous().view(torch.uint8)
                own = _pairs(numbers.numpy().tobytes(), dtype.itemsize, _BYTES)
                at = np.searchsorted(there, own).clip(max=len(there) - 1)
                if bool((there[at] == own).any()):
                    seen.add(number)
    return seen


_BYTES = 8
"""Two weights of 32 bits or four of 16: random ones are nowhere else by chance."""


def _pairs(held: bytes, step: int, width: int) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    """Return every window of so many bytes, as a number."""
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(held, np.uint8), width)
    return np.ascontiguousarray(windows[::step]).view(np.uint64).ravel()


def in_one_process(recipe: Recipe, folder: Path) -> str:
    """Return the hash of a run over the sites' own data, each cut as its site cuts it."""
    return state_sha256(played_here(recipe, folder))


def played_here(recipe: Recipe, folder: Path) -> Run[Any]:
    """Return that run."""
    source = Path(recipe.data.source)
    sites = [SiteSettings(site, folder, source / f"{site}.jsonl") for site in SITES]
    session = build(recipe, folder, makers=Makers(federation=all_own(sites)))
    run = begin(recipe.algorithm, session.space.start(), recipe.run.seed)
    stage = stage_of(session)
    run = stage.before(run) if stage else run
    for _ in range(recipe.run.rounds):
        run, _, _ = advance(
            run,
            recipe.algorithm,
            session.engine,
            population=session.learners,
            sampler=recipe.cohort,
        )
        run = stage.after(run)[0] if stage else run
    return run


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
