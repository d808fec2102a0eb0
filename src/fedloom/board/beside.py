"""Chosen runs beside each other: curves, a table, and the settings that differ."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.reopen import flatten
from fedloom.report.compare import Compared, compared
from fedloom.report.run_folder import Results

_NAMES = ("name", "description")
_ABSENT = "\u2013"


def beside(folders: Sequence[Path], metric: str | None) -> dict[str, Any]:
    """Return what the page of a comparison shows.

    Args:
        folders: Of runs, at least two.
        metric: As in metrics.jsonl; None chooses.

    Raises:
        ValueError: where the runs have no metric in common, or not the one asked for.
    """
    found = compared(folders, metric)
    return {
        **found.page(),
        "metric": found.metric.name,
        "metrics": _shared(found),
        "settings": differing(found.runs),
    }


def differing(runs: Mapping[str, Results]) -> list[tuple[str, list[str]]]:
    """Return the settings that are not the same in all runs, with each run's value, as text."""
    settings = [
        {name: value for name, value in flatten(run.recipe).items() if name not in _NAMES}
        for run in runs.values()
    ]
    names = sorted(dict.fromkeys(name for each in settings for name in each))
    rows = [(name, [_text(each, name) for each in settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _text(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return _ABSENT
    value = settings[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _shared(found: Compared) -> list[tuple[str, str]]:
    """Return name and title of the metrics that all runs have and of which one way is better."""
    first, *others = found.runs.values()
    return [
        (name, first.metric(name).title)
        for name in first.metrics()
        if name.startswith(("test/", "validation/", "train/"))
        and all(name in run.metrics() for run in others)
        and first.metric(name).better != "none"
    ]
