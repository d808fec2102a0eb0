"""What this machine has for a run: versions, devices, extras, and where models and data are kept."""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from rich.table import Table
from rich.text import Text

from fedloom.models.gguf import CACHE

GIB = 1024**3
Row = tuple[str, str, str]
"""What is looked at, what was found, and what to do about it."""


def doctor() -> Table:
    """Return a table of everything a run depends on here."""
    table = Table(title=f"fedloom {version('fedloom')} on {platform.platform()}", show_lines=False)
    for header in ("what", "here", "note"):
        table.add_column(header, overflow="fold")
    for rows in (packages(), devices(), extras(), caches()):
        for row in rows:
            # As Text: the brackets of an extra would be read as markup.
            table.add_row(*map(Text, row))
        table.add_section()
    return table


def packages() -> Iterator[Row]:
    """Yield Python and the packages every run needs, with the version asked for."""
    yield "python", platform.python_version(), ""
    for name, wanted, extra in _requirements():
        if not extra:
            here = _installed(name)
            note = f"asks for {name}{wanted}" if here else f"missing: pip install '{name}{wanted}'"
            yield name, here or "-", note


def devices() -> Iterator[Row]:
    """Yield where a model can be trained."""
    memory = psutil.virtual_memory()
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads, OMP_NUM_THREADS sets them"
    size = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    yield "cpu", size, threads
    for at in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(at)
        note = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        yield f"cuda:{at}", torch.cuda.get_device_name(at), note
    if torch.backends.mps.is_available():
        yield "mps", "available", "shares the memory of the cpu"
    if not torch.cuda.device_count():
        build = torch.version.cuda
        yield (
            "cuda",
            "-",
            f"torch is built for CUDA {build}" if build else "torch is built for the cpu",
        )


def extras() -> Iterator[Row]:
    """Yield each extra of the package and what of it is missing."""
    wanted: dict[str, list[str]] = {}
    for name, _, extra in _requirements():
        if extra:
            wanted.setdefault(extra, []).append(name)
    for extra, names in wanted.items():
        found = [f"{name} {_installed(name)}" for name in names if _installed(name)]
        note = "" if len(found) == len(names) else f"pip install 'fedloom[{extra}]'"
        yield f"[{extra}]", ", ".join(found) or "-", note


def caches() -> Iterator[Row]:
    """Yield the folders of downloads, as Hugging Face reads them from the environment, and of what is made of them."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for what, setting, default in (
        ("models", "HF_HUB_CACHE", home / "hub"),
        ("data sets", "HF_DATASETS_CACHE", home / "datasets"),
        ("converted GGUF files", CACHE, Path("~/.cache/fedloom")),
    ):
        folder = Path(os.environ.get(setting, default)).expanduser()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / GIB
        offline = ", offline" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        offline = offline if setting.startswith("HF_") else ""
        yield what, str(folder), f"{setting} moves it; {free:.1f} GiB free{offline}"


def _requirements() -> Iterator[tuple[str, str, str]]:
    """Yield (name, versions, extra) of the package's own metadata; the extra is empty for what is always needed."""
    for line in requires("fedloom") or ():
        spec, _, marker = line.partition(";")
        split = re.match(r"([A-Za-z0-9_.-]+)(.*)", spec.strip())
        assert split, f"unreadable requirement {line!r}"
        extra = re.search(r"extra == ['\"]([^'\"]+)", marker)
        yield split[1], split[2].strip(), extra[1] if extra else ""


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
