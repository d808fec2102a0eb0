"""What a run ran on: versions, machine, command."""

import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

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


def peak_memory_bytes() -> int:
    """Return the most main memory this process has held so far."""
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


def peak_gpu_memory_bytes() -> int:
    """Return the most memory this process has held on one GPU so far; 0 without one."""
    return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())), default=0)


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
