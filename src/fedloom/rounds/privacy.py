"""What a run may say of its privacy: in its report, model card and summary, and on the terminal."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedloom.core.description import Privacy
from fedloom.core.metrics import METRICS
from fedloom.core.protocols import Metrics
from fedloom.rounds.reading import read_json
from fedloom.tracking.metric_format import shown
from fedloom.tracking.metrics_log import MetricsLog

FILE = "privacy.json"
"""What is promised, beside the run it is promised of."""
EPSILON = "server/epsilon"
"""The metric."""
_COVERED = (
    "It is of the models of all rounds, for one client more or less; metrics, counts, cohort sizes and samples are not"
    " covered."
)


def read_promise(folder: Path, *, remedy: str) -> Privacy | None:
    """Return what the run in a folder promised; None where it wrote nothing down.

    Raises:
        ValueError: where the file is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return None
    found = read_json(file, dict, remedy=remedy)
    delta = found.get("delta")
    if found.keys() != asdict(Privacy()).keys() or not isinstance(delta, float | None):
        raise ValueError(f"{file} holds no promise as a run writes it: {remedy}")
    return Privacy(**found)


def privacy_record(promised: Privacy | None, history: MetricsLog) -> dict[str, Any] | None:
    """Return epsilon (None where nothing is promised), delta, and both in a short and a whole sentence.

    None where the run is not private.

    Args:
        promised: What the algorithm tells; None where that is not known.
        history: The run's metrics.
    """
    points, terms = history.of(EPSILON), promised or Privacy()
    if terms.void:
        return _record(None, terms, f"none: {terms.void}", f"None: {terms.explanation}.")
    if not points:
        return None
    number, epsilon = points[-1]
    at = f" at delta {terms.delta:g}" if terms.delta else ""
    value = shown(METRICS.of(EPSILON), epsilon)
    sentence = f"After round {number}, epsilon is {value}{at}. {_COVERED}"
    return _record(epsilon, terms, f"epsilon {value}{at}", sentence)


def covered(metrics: Metrics) -> Metrics:
    """Return what follows from noisy means; evaluations, counts, bytes and times follow from who took part."""
    return {name: value for name, value in metrics.items() if name.startswith("server/")}


def _record(epsilon: float | None, terms: Privacy, short: str, sentence: str) -> dict[str, Any]:
    finite = epsilon is not None and math.isfinite(epsilon)
    return {
        "epsilon": epsilon if finite else None,
        "delta": terms.delta,
        "short": short,
        "said": sentence,
    }
