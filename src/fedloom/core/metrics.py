"""What a client may report of itself, and within which bounds: numbers of strangers go into means and files."""

import math
from collections.abc import Mapping

from fedloom.core.protocols import Metrics

_COUNT = (0.0, 2.0**53)
_SHARE = (0.0, 1.0)
RANGES: Mapping[str, tuple[float, float]] = {
    "loss": (0.0, 1e6),
    "perplexity": (1.0, math.inf),
    "accuracy": _SHARE,
    "token_accuracy": _SHARE,
    "exact_match": _SHARE,
    "rouge1": _SHARE,
    "rougeL": _SHARE,
    "rouge_l_paper": _SHARE,
    "chrf": _SHARE,
    "num_tokens": _COUNT,
    "num_examples": _COUNT,
    "skipped_steps": _COUNT,
}
"""The metrics of clients, with the smallest and the largest value."""
PREFIXES = ("personal/",)
"""What a wrapper may put in front of a name, for a second model at the client."""
MEASURED = ("num_examples", "num_tokens", "loss")
"""What no evaluation goes without: all means over clients are weighed by it."""
_UNSURE = ("loss", "perplexity")
"""What is NaN where a model has diverged."""


def checked(metrics: Mapping[str, object], *, measured: bool) -> Metrics:
    """Return reported metrics as floats.

    Args:
        metrics: As a stranger sent them.
        measured: Whether they are of an evaluation: then what means are weighed by must be there, and the loss of a
            model that has diverged may be NaN.

    Raises:
        ValueError: for a name that nothing reports, a value that is no number or out of its range, and an evaluation
            that says too little to be averaged.
    """
    told = {name: _value(name, value, unsure=measured) for name, value in metrics.items()}
    if measured:
        _check_measured(told)
    return told


def has_diverged(metrics: Metrics) -> bool:
    """Return whether a measured loss is not finite."""
    return not math.isfinite(metrics["loss"])


def _check_measured(metrics: Metrics) -> None:
    missing = [name for name in MEASURED if name not in metrics]
    if missing:
        raise ValueError(f"an evaluation must report {', '.join(MEASURED)}, got no {missing[0]}")
    if metrics["num_examples"] < 1 or metrics["num_tokens"] < 1:
        raise ValueError("an evaluation must be of at least one example and one target token")


def _value(name: str, value: object, *, unsure: bool) -> float:
    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
    known = name.removeprefix(prefix)
    if known not in RANGES:
        raise ValueError(f"a metric must be one of {', '.join(RANGES)}, got {ascii(name)[:60]}")
    if type(value) is not int and type(value) is not float:
        raise ValueError(f"{name} must be a number, got {ascii(value)[:60]}")
    low, high = RANGES[known]
    # Compared as it is: a whole number may be too large for a float.
    if low <= value <= high or (
        unsure and known in _UNSURE and type(value) is float and math.isnan(value)
    ):
        return float(value)
    raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {ascii(value)[:60]}")
