"""A run directory, read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from fedloom.core.protocols import ClientId
from fedloom.run.history import History
from fedloom.run.influence import FILE as INFLUENCE_FILE
from fedloom.run.trackers import JsonLines


@dataclass(frozen=True)
class Results:
    """What one run left behind; whatever is not there is empty."""

    folder: Path
    history: History
    clients: Sequence[Mapping[str, Any]]
    """Lines of clients.jsonl."""
    samples: Sequence[Mapping[str, Any]]
    recipe_text: str
    recipe: Mapping[str, Any]
    manifest: Mapping[str, Any]
    environment: Mapping[str, Any]
    summary: Mapping[str, Any]
    seeds: Mapping[str, Any]
    """Of runs in seed space: seeds.json."""
    clusters: Mapping[str, Any]
    """Of runs that group their clients: clusters.json."""
    influence: Sequence[Mapping[str, Any]]
    """Of runs whose server may leave clients out: lines of influence.jsonl."""
    by_label: Mapping[str, Any]
    """Of runs with evaluation.by: by_label.json."""
    baselines: Mapping[str, "Results"]

    @property
    def name(self) -> str:
        """Return what the recipe calls the run, else its folder."""
        return str(self.summary.get("name") or self.recipe.get("name") or self.folder.name)

    def metrics(self) -> list[str]:
        """Return the metrics with a value in some round."""
        return list(dict.fromkeys(name for line in self.history.lines for name in line))

    def ends(self, metric: str) -> tuple[float | None, float | None]:
        """Return a metric before training and at the end; before is None where only the end was measured."""
        values = self.history.of(metric)
        if not values:
            return None, None
        return (values[0][1] if values[0][0] == 0 else None), values[-1][1]

    def total_bytes(self) -> dict[int, float]:
        """Return the bytes of all rounds up to each one, both ways."""
        lines = self.history.lines
        each = [x.get("comm/upload_bytes", 0) + x.get("comm/download_bytes", 0) for x in lines]
        return {int(x["round"]): total for x, total in zip(lines, accumulate(each), strict=True)}

    def by_client(self, metric: str) -> tuple[dict[ClientId, float], dict[ClientId, float]]:
        """Return every client's value of a metric, before training and when last measured."""
        split, _, name = metric.rpartition("/")
        before: dict[ClientId, float] = {}
        last: dict[ClientId, float] = {}
        for row in self.clients:
            value = row["metrics"].get(name)
            if row["split"] == split and value is not None:
                last[row["client"]] = value
                if row["round"] == 0:
                    before[row["client"]] = value
        return before, last


def read_results(folder: Path) -> Results:
    """Read a run directory and the baselines in it.

    Raises:
        ValueError: where the folder holds no run, or a file in it is damaged.
    """
    if not (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"{folder} is no run directory: it holds no metrics.jsonl; give the folder of a run"
        )
    recipe = folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8") if recipe.exists() else ""
    below = sorted((folder / "baselines").glob("*/metrics.jsonl"))
    return Results(
        folder=folder,
        history=History.read(folder / "metrics.jsonl"),
        clients=JsonLines(folder / "clients.jsonl").rows(),
        samples=_json(folder / "samples.json", []),
        recipe_text=text,
        recipe=yaml.safe_load(text) or {},
        manifest=_json(folder / "manifest.json", {}),
        environment=_json(folder / "environment.json", {}),
        summary=_json(folder / "summary.json", {}),
        seeds=_json(folder / "seeds.json", {}),
        clusters=_json(folder / "clusters.json", {}),
        influence=JsonLines(folder / INFLUENCE_FILE).rows(),
        by_label=_json(folder / "by_label.json", {}),
        baselines={file.parent.name: read_results(file.parent) for file in below},
    )


def by_name(runs: Sequence[Results], *, reserved: Sequence[str] = ()) -> dict[str, Results]:
    """Return the runs by name; those of one name are told apart by their folders."""
    names = [*reserved, *(run.name for run in runs)]
    return {
        run.name if names.count(run.name) == 1 else f"{run.name} ({run.folder})": run
        for run in runs
    }


def _json(path: Path, missing: Any) -> Any:
    if not path.exists():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it to go on without it") from error
