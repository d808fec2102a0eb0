"""What a run ran on: versions, machine, command."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch


@dataclass
class _Peaks:
    """The most memory of the phases that are over."""

    main: int = 0
    gpu: int = 0


_EARLIER = _Peaks()
_PACKAGES = ("fedloom", "torch", "transformers", "peft", "datasets", "numpy")


def collect(command: Sequence[str] = ()) -> dict[str, Any]:
    """Return what environment.json holds; `command` is the command line, by default this process's."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(command or [Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "os": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu(),
        "num_cores": len(psutil.Process().cpu_affinity() or [])
        if sys.platform == "linux"
        else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [
            {"name": device.name, "memory_bytes": device.total_memory}
            for device in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
    }


@contextmanager
def phase_memory(phase: str) -> Iterator[dict[str, float]]:
    """Yield a dict that holds `memory/PHASE_bytes` afterwards, and `_gpu_bytes` with a GPU: the most held meanwhile.

    It stays without the first where a system cannot forget its peak (all but Linux). Phases do not nest.
    """
    peaks: dict[str, float] = {}
    _return_freed()
    _EARLIER.main, _EARLIER.gpu = peak_memory_bytes(), peak_gpu_memory_bytes()
    for device in _gpus():
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        forgotten = True
    except OSError:
        forgotten = False
    yield peaks
    if forgotten:
        peaks[f"memory/{phase}_bytes"] = float(_main_peak())
    if _gpus():
        peaks[f"memory/{phase}_gpu_bytes"] = float(_gpu_peak())


def _return_freed() -> None:
    """Let the C library return what it keeps of freed memory, which would count as held by whoever comes next."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # it is not glibc
            ctypes.CDLL(None).malloc_trim(0)


def peak_memory_bytes() -> int:
    """Return the most main memory this process has held so far."""
    return max(_EARLIER.main, _main_peak())


def peak_gpu_memory_bytes() -> int:
    """Return the most memory this process has held on one GPU so far; 0 without one."""
    return max(_EARLIER.gpu, _gpu_peak())


def _main_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its maximum is inherited from the process that started this one.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(psutil.Process().memory_info().rss)


def _gpu_peak() -> int:
    return max(map(torch.cuda.max_memory_allocated, _gpus()), default=0)


def _gpus() -> range:
    """Return the GPUs; none where this process has not touched one, lest asking does."""
    touched: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch does not say
    return range(torch.cuda.device_count() if touched else 0)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
