"""A run directory, read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from fedloom.core.description import Privacy
from fedloom.core.metrics import Metric
from fedloom.core.protocols import ClientId
from fedloom.rounds.costs import FILE as COSTS_FILE
from fedloom.rounds.inputs import read_notes
from fedloom.rounds.privacy import read_promise
from fedloom.rounds.reading import metrics_of, read_json, read_recipe_text
from fedloom.rounds.server_metrics import FILE as INFLUENCE_FILE
from fedloom.tracking.metrics_log import MetricsLog
from fedloom.tracking.records import records, unaccounted

T = TypeVar("T")
_GONE = "remove it to go on without it"
_SAMPLE = {"client", "labels", "prompt", "reference", "before", "after"}


@dataclass(frozen=True)
class Results:
    """What one run left behind; whatever is not there is empty."""

    folder: Path
    history: MetricsLog
    clients: Sequence[Mapping[str, Any]]
    """Lines of clients.jsonl."""
    samples: Sequence[Mapping[str, Any]]
    recipe_text: str
    recipe: Mapping[str, Any]
    manifest: Mapping[str, Any]
    environment: Mapping[str, Any]
    summary: Mapping[str, Any]
    privacy: Privacy | None
    """Of runs that promise any: privacy.json."""
    seeds: Mapping[str, Any]
    """Of runs in seed space: seeds.json."""
    clusters: Mapping[str, Any]
    """Of runs that group their clients: clusters.json."""
    influence: Sequence[Mapping[str, Any]]
    """Of runs whose server may leave clients out: lines of influence.jsonl."""
    costs: Sequence[Mapping[str, Any]]
    """Lines of costs.jsonl: what every client spent on each round."""
    by_label: Mapping[str, Any]
    """Of runs with evaluation.by: by_label.json."""
    anyway: Sequence[Mapping[str, Any]]
    """Lines of anyway.jsonl: commands that went on although data or model had changed."""
    baselines: Mapping[str, "Results"]

    @property
    def name(self) -> str:
        """Return what the recipe calls the run, else its folder."""
        return str(self.summary.get("name") or self.recipe.get("name") or self.folder.name)

    def drawn(self, split: str) -> tuple[int, int] | None:
        """Return how many clients each evaluation draws, and of how many; None where all are measured."""
        section = self.recipe.get("evaluation")
        wanted = section.get("clients") if isinstance(section, Mapping) else None
        clients, unseen = self.manifest.get("clients", {}), self.manifest.get("unseen", ())
        able = sum(bool(counts.get(split)) for c, counts in clients.items() if c not in unseen)
        return (wanted, able) if isinstance(wanted, int) and wanted < able else None

    def metric(self, name: str) -> Metric:
        """Return what is known of a metric, by its name in metrics.jsonl."""
        return self.history.table.of(name)

    def metrics(self) -> list[str]:
        """Return the metrics that were measured in some round."""
        return list(dict.fromkeys(name for line in self.history.lines for name in line))

    def ends(self, metric: str) -> tuple[float | None, float | None]:
        """Return a metric before training and at the end; before is None where only the end was measured."""
        return self.history.ends(metric)

    def total_bytes(self) -> dict[int, float]:
        """Return the bytes of all rounds up to each one, both ways."""
        lines = self.history.lines
        each = [x.get("comm/upload_bytes", 0) + x.get("comm/download_bytes", 0) for x in lines]
        return {int(x["round"]): total for x, total in zip(lines, accumulate(each), strict=True)}

    def by_client(self, metric: str) -> tuple[dict[ClientId, float], dict[ClientId, float]]:
        """Return every client's value of a metric, before training and when last measured, NaN where not finite.

        Where each evaluation draws its clients, of those that the last one drew.
        """
        split, _, name = metric.rpartition("/")
        rows = [row for row in self.clients if row["split"] == split]
        if self.drawn(split):
            last_round = max((row["round"] for row in rows), default=0)
            there = {row["client"] for row in rows if row["round"] == last_round}
            rows = [row for row in rows if row["client"] in there]
        before: dict[ClientId, float] = {}
        last: dict[ClientId, float] = {}
        for row in rows:
            if name in row["metrics"]:
                found = row["metrics"][name]
                last[row["client"]] = value = math.nan if found is None else found
                if row["round"] == 0:
                    before[row["client"]] = value
        return before, last


def read_results(folder: Path) -> Results:
    """Read a run directory and the baselines in it.

    Raises:
        ValueError: where the folder holds no run, or a file in it is damaged.
    """
    results = _read(folder)
    below = sorted((folder / "baselines").glob("*/metrics.jsonl"))
    # A baseline has none: what a link makes of a run's own folder does not go on without end.
    return replace(results, baselines={file.parent.name: _read(file.parent) for file in below})


def _read(folder: Path) -> Results:
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder of a run")
    if not (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"{folder} is no run directory: it holds no metrics.jsonl; give the folder of a run"
        )
    text, recipe = ("", {}) if not (folder / "recipe.yaml").exists() else read_recipe_text(folder)
    samples = _json(folder / "samples.json", list)
    if not all(isinstance(one, dict) and one.keys() >= _SAMPLE for one in samples):
        raise ValueError(
            f"{folder / 'samples.json'} holds no samples as a run writes them: {_GONE}"
        )
    results = Results(
        folder=folder,
        history=MetricsLog.read(folder / "metrics.jsonl", metrics_of(folder)),
        clients=records(folder / "clients.jsonl").rows(),
        samples=samples,
        recipe_text=text,
        recipe=recipe,
        manifest=_json(folder / "manifest.json", dict),
        environment=_json(folder / "environment.json", dict),
        summary=_json(folder / "summary.json", dict),
        privacy=read_promise(folder, remedy=_GONE),
        seeds=_json(folder / "seeds.json", dict),
        clusters=_json(folder / "clusters.json", dict),
        influence=records(folder / INFLUENCE_FILE).rows(),
        costs=records(folder / COSTS_FILE).rows(),
        by_label=_json(folder / "by_label.json", dict),
        anyway=read_notes(folder),
        baselines={},
    )
    _check_whole(results)
    return results


def _check_whole(run: Results) -> None:
    """Refuse records that tell of less than the run did, and a split that is none."""
    num_rounds, last = run.summary.get("rounds"), len(run.history.lines) - 1
    if isinstance(num_rounds, int) and last < num_rounds:
        ends = f"ends at round {last}" if run.history.lines else "holds no round"
        raise ValueError(
            f"{run.folder / 'metrics.jsonl'} {ends}, but summary.json tells of {num_rounds} rounds: put it back as the run"
            f" wrote it, or go on with `fedloom resume {run.folder}`"
        )
    of_round: dict[int, list[Mapping[str, Any]]] = {}
    for row in run.clients:
        of_round.setdefault(row["round"], []).append(row)
    for line in run.history.lines:
        if lost := unaccounted(line, of_round.get(int(line["round"]), ())):
            split, found, wanted = lost
            raise ValueError(
                f"{run.folder / 'clients.jsonl'} tells of {found:.0f} of the {wanted:.0f} {split} examples of"
                f" round {line['round']}: put it back as the run wrote it"
            )
    clients = run.manifest.get("clients", {})
    if not isinstance(clients, dict) or not all(isinstance(one, dict) for one in clients.values()):
        raise ValueError(f"{run.folder / 'manifest.json'} is no manifest of a split: {_GONE}")


def by_name(runs: Sequence[Results], *, reserved: Sequence[str] = ()) -> dict[str, Results]:
    """Return the runs by name; those of one name are told apart by their folders."""
    names = [*reserved, *(run.name for run in runs)]
    return {
        run.name if names.count(run.name) == 1 else f"{run.name} ({run.folder})": run
        for run in runs
    }


def _json(path: Path, kind: type[T]) -> T:
    return read_json(path, kind, remedy=_GONE) if path.exists() else kind()
