"""What a run may say of its privacy: in its report, model card and summary, and on the terminal."""

import math
from collections.abc import Mapping
from typing import Any

from fedloom.core.metrics import METRICS
from fedloom.tracking.metric_format import shown
from fedloom.tracking.metrics_log import MetricsLog

EPSILON = "server/epsilon"
"""The metric."""
KNOWN_SEED = (
    "private.noise_seed is set: a known seed gives the noise away, so it protects nobody; leave it out where that is not a"
    " test"
)
_COVERED = (
    "It is of the models of all rounds, for one client more or less; metrics, counts, cohort sizes and samples are not"
    " covered."
)


def describe_privacy(algorithm: object, history: MetricsLog) -> dict[str, Any] | None:
    """Return epsilon (None where nothing is promised), delta, and both in a short and a whole sentence.

    None where the run is not private.

    Args:
        algorithm: As the resolved recipe has it.
        history: The run's metrics.
    """
    private, points = private_settings(algorithm), history.of(EPSILON)
    if private is None and not points:
        return None
    private = private or {}
    if private.get("noise_seed") is not None:
        return _told(None, private, "none: noise_seed is set", f"None: {KNOWN_SEED}.")
    if private.get("noise_multiplier") == 0:
        why = "none: noise_multiplier is 0"
        return _told(
            None, private, why, "None: private.noise_multiplier is 0, so no noise is added."
        )
    if not points:
        return None
    number, epsilon = points[-1]
    at = f" at delta {private['delta']:g}" if private.get("delta") else ""
    value = shown(METRICS.of(EPSILON), epsilon)
    long = f"After round {number}, epsilon is {value}{at}. {_COVERED}"
    return _told(epsilon, private, f"epsilon {value}{at}", long)


def private_settings(algorithm: object) -> Mapping[str, Any] | None:
    """Return the section `private` of a resolved recipe's algorithm, however deep; None where there is none."""
    if isinstance(algorithm, Mapping):
        found = algorithm.get("private")
        if isinstance(found, Mapping):
            return found
        algorithm = list(algorithm.values())
    if isinstance(algorithm, list):
        return next((one for one in map(private_settings, algorithm) if one is not None), None)
    return None


def _told(
    epsilon: float | None, private: Mapping[str, Any], short: str, long: str
) -> dict[str, Any]:
    finite = epsilon is not None and math.isfinite(epsilon)
    return {
        "epsilon": epsilon if finite else None,
        "delta": private.get("delta"),
        "short": short,
        "said": long,
    }
