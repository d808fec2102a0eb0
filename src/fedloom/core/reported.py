"""What a client may report of itself, and within which bounds: numbers of strangers go into means and files."""

import math
from collections.abc import Mapping

from fedloom.core.metrics import METRICS, PREFIXES, WEIGHTS, Metric, MetricTable
from fedloom.core.protocols import Metrics

MEASURED = (*WEIGHTS, "loss")
"""What no evaluation goes without: all means over clients are weighed by it."""
_UNSURE = ("loss", "perplexity")
"""What is NaN where a model has diverged."""


def checked(
    metrics: Mapping[str, object], *, measured: bool, table: MetricTable = METRICS
) -> Metrics:
    """Return reported metrics as floats.

    Args:
        metrics: As a stranger sent them.
        measured: Whether they are of an evaluation: then what means are weighed by must be there, and the loss of a
            model that has diverged may be NaN.
        table: Which metrics there are, with their bounds.

    Raises:
        ValueError: for a name that nothing reports, a value that is no number or out of its range, and an evaluation
            that says too little to be averaged.
    """
    known = table.reported()
    told = {name: _value(name, value, known, unsure=measured) for name, value in metrics.items()}
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


def _value(name: str, value: object, known: Mapping[str, Metric], *, unsure: bool) -> float:
    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
    base = name.removeprefix(prefix)
    if base not in known:
        raise ValueError(f"a metric must be one of {', '.join(known)}, got {ascii(name)[:60]}")
    if type(value) is not int and type(value) is not float:
        raise ValueError(f"{name} must be a number, got {ascii(value)[:60]}")
    # Compared as it is: a whole number may be too large for a float.
    if known[base].takes(value) or (
        unsure and base in _UNSURE and type(value) is float and math.isnan(value)
    ):
        return float(value)
    low, high = known[base].bounds
    raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {ascii(value)[:60]}")
