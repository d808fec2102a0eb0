"""What a run ran on, as rows of the page: machine, versions, time and memory."""

from collections.abc import Mapping
from typing import Any

from fedloom.report.run_folder import Results
from fedloom.tracking.metric_format import duration
from fedloom.tracking.units import human_bytes

_PHASES = {"train": "training", "evaluate": "evaluation", "rebuild": "rebuilding the model"}


def machine_rows(own: Results) -> list[tuple[str, str]]:
    """Return (what, value) of all that is known."""
    machine, summary = own.environment, own.summary
    versions = {"python": machine.get("python"), **machine.get("versions", {})}
    rows = [
        ("Date", machine.get("date")),
        ("Command", machine.get("command")),
        ("Versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)),
        ("System", machine.get("os")),
        ("Processor", _processor(machine)),
        ("Wall time", duration(summary["wall_seconds"]) if "wall_seconds" in summary else None),
        ("Peak memory", _bytes(summary.get("peak_memory_bytes"))),
        ("Peak memory by phase", _phases(own, "")),
        ("GPU memory by phase", _phases(own, "gpu_")),
        ("Split, SHA-256", own.manifest.get("sha256")),
        ("Final state, SHA-256", summary.get("state_sha256")),
    ]
    return [(name, value) for name, value in rows if value]


def _processor(machine: Mapping[str, Any]) -> str:
    if "cpu" not in machine:
        return ""
    parts = [
        f"{machine['cpu']}, {machine['num_cores']} cores ({machine['num_threads']} threads used)",
        f"{human_bytes(machine['memory_bytes'])} memory",
        *(f"{gpu['name']} ({human_bytes(gpu['memory_bytes'])})" for gpu in machine["gpus"]),
    ]
    return ", ".join(parts)


def _bytes(count: float | None) -> str:
    return human_bytes(count) if count else ""


def _phases(own: Results, kind: str) -> str:
    """Return the most memory held in any round of each phase."""
    told = {
        phase: [value for _, value in own.history.of(f"memory/{phase}_{kind}bytes")]
        for phase in _PHASES
    }
    rebuild = (own.seeds.get("rebuild") or {}).get(f"memory/rebuild_{kind}bytes")
    told["rebuild"] += [rebuild] if rebuild else []
    peaks = [
        f"{_PHASES[phase]} {human_bytes(max(values))}" for phase, values in told.items() if values
    ]
    return ", ".join(peaks)
