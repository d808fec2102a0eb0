"""How numbers are written where people read them, and which metrics tables show."""

import math
from collections.abc import Iterable

from fedloom.core.metrics import FINETUNED, PLUGIN, PUBLIC, QUALITY, Metric, MetricTable


def human_bytes(count: float) -> str:
    """Return a byte count in decimal units, three digits: 1234567 -> 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    if unit == "B":
        return f"{count:.0f} B"
    digits = 2 if count < 10 else 1 if count < 100 else 0
    return f"{count:.{digits}f} {unit}"


_QUALITY = (
    "test/exact_match",
    "test/accuracy",
    "test/loss",
    "validation/accuracy",
    "validation/loss",
    "train/loss",
)
MINUS = "\u2212"


def measures(found: Iterable[str], table: MetricTable) -> list[str]:
    """Return those metrics that tables show of a model, in their order: the test split's, then validation loss.

    What is measured around an emulator comes before what is measured with the whole model in its place, that before what
    is measured after a client's own steps, then come clients that never train, and the server's own text.
    """
    kinds = ("", PLUGIN, FINETUNED, f"{FINETUNED}{PLUGIN}")
    splits = [f"{split}{kind}" for split in ("test/", "unseen/") for kind in kinds]
    splits += [PUBLIC, f"{PUBLIC}{PLUGIN}"]
    names = [f"{split}{name}" for split in splits for name in (*QUALITY, *table.own)]
    names += ["validation/loss", f"validation/{PLUGIN}loss"]
    there = set(found)
    return [name for name in names if name in there]


def shown(metric: Metric, value: float | None) -> str:
    """Return a metric's value: shares in per cent, bytes in decimal units, else three decimals and the unit."""
    if value is None:
        return "\u2013"
    if not math.isfinite(value):
        return "not finite"
    if metric.unit == "B":
        return human_bytes(value)
    if metric.is_share:
        return f"{100 * value:.1f} %"
    digits = 3 if abs(value) < 100 else 1
    return f"{value:.{digits}f} {metric.unit}".rstrip().replace("-", MINUS)


def change(metric: Metric, before: float | None, after: float | None) -> str:
    """Return what became of a metric: points for shares, the difference of other scores from 0 to 1, else per cent."""
    if before is None or after is None or not math.isfinite(before + after):
        return ""
    if metric.is_share:
        return f"{100 * (after - before):+.1f} points".replace("-", MINUS)
    if metric.bounds == (0, 1):
        return f"{after - before:+.3f}".replace("-", MINUS)
    return f"{100 * (after / before - 1):+.0f} %".replace("-", MINUS) if before else ""


def duration(seconds: float) -> str:
    """Return a time: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def quality(measured: Iterable[Iterable[str]]) -> str | None:
    """Return the metric that says most and all of the runs have."""
    runs = [set(metrics) for metrics in measured]
    shared = set.intersection(*runs) if runs else set()
    return next((metric for metric in _QUALITY if metric in shared), None)


def better(metric: Metric) -> str:
    """Return which direction is an improvement; nothing where neither is."""
    return "" if metric.better == "none" else f"{metric.better} is better"
