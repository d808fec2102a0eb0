"""How metrics are called and written where people read them."""

import math
from collections.abc import Iterable

from fedloom.tracking.metrics_log import lower_is_better
from fedloom.tracking.units import human_bytes

_NAMES = {
    "exact_match": "exact match",
    "token_accuracy": "token accuracy",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
    "rouge_l_paper": "ROUGE-L (rouge 1.0.1)",
    "chrf": "chrF",
}
_SHARES = ("exact_match", "token_accuracy", "accuracy")
_QUALITY = (
    "test/exact_match",
    "test/accuracy",
    "test/loss",
    "validation/accuracy",
    "validation/loss",
    "train/loss",
)
MEASURES = (
    "test/exact_match",
    "test/accuracy",
    "test/loss",
    "test/perplexity",
    "test/token_accuracy",
    "test/rouge1",
    "test/rougeL",
    "test/rouge_l_paper",
    "test/chrf",
    "validation/loss",
)
"""What tables show of a model, in their order."""
MINUS = "\u2212"


def title(metric: str) -> str:
    """Return the name of a metric: test/exact_match -> Test exact match."""
    split, _, name = metric.rpartition("/")
    words = f"{split} {_NAMES.get(name, name.replace('_', ' '))}".strip()
    return words[:1].upper() + words[1:]


def shown(metric: str, value: float | None) -> str:
    """Return a metric's value: shares in per cent, bytes in decimal units, else three decimals."""
    if value is None:
        return "\u2013"
    if not math.isfinite(value):
        return "not finite"
    name = metric.rpartition("/")[2]
    if name.endswith("bytes"):
        return human_bytes(value)
    if is_share(metric):
        return f"{100 * value:.1f} %"
    digits = 3 if abs(value) < 100 else 1
    return f"{value:.{digits}f}".replace("-", MINUS)


def change(metric: str, before: float | None, after: float | None) -> str:
    """Return what became of a metric: points for shares, the difference for ROUGE, else per cent."""
    if before is None or after is None or not math.isfinite(before + after):
        return ""
    if is_share(metric):
        return f"{100 * (after - before):+.1f} points".replace("-", MINUS)
    if metric.rpartition("/")[2].startswith(("rouge", "chrf")):
        return f"{after - before:+.3f}".replace("-", MINUS)
    return f"{100 * (after / before - 1):+.0f} %".replace("-", MINUS) if before else ""


def is_share(metric: str) -> bool:
    """Return whether a metric is a share from 0 to 1 that is read in per cent."""
    return metric.rpartition("/")[2] in _SHARES


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


def better(metric: str) -> str:
    """Return which direction is an improvement."""
    return "lower is better" if lower_is_better(metric) else "higher is better"
