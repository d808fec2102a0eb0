"""Where a run's numbers go: JSON lines always, dashboards when named."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import yaml

from fedloom.core.protocols import Metrics
from fedloom.tracking.records import records


class Tracker(Protocol):
    """Takes the metrics of every round."""

    def log(self, round: int, metrics: Metrics) -> None:
        """Take the metrics of one round."""
        ...

    def truncate_after(self, round: int) -> None:
        """Forget the rounds beyond `round`, after which a run resumes; -1 forgets all."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Take what remains of the run, and close."""
        ...


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is unknown or whose package is not installed, before anything is written."""
    for tracker in names:
        if tracker not in TRACKERS:
            raise ValueError(
                f"run.trackers may hold {', '.join(TRACKERS)}, got {tracker!r} "
                f"(metrics.jsonl is always written)"
            )
        if find_spec(tracker) is None:
            raise ValueError(
                f"run.trackers names {tracker}, which is not installed: pip install fedloom[trackers]"
            )


def make_trackers(folder: Path, names: Sequence[str], *, name: str) -> list[Tracker]:
    """Return the tracker of metrics.jsonl and those named; a resumed run goes on in the same dashboard.

    Args:
        folder: The run directory; its recipe.yaml becomes the dashboards' configuration.
        names: Of TRACKERS.
        name: What dashboards call the run.

    Raises:
        ValueError: where a name is unknown or its package is not installed.
    """
    check_trackers(names)
    recipe = folder / "recipe.yaml"
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.exists() else {}
    run = _Opening(folder, name, settings)
    jsonl: Tracker = records(folder / "metrics.jsonl")
    return [jsonl, *(TRACKERS[tracker](run) for tracker in names)]


@dataclass(frozen=True)
class _Opening:
    """What a dashboard is told when it opens."""

    folder: Path
    name: str
    recipe: Mapping[str, Any]

    def stored_id(self, file: str, fresh: Callable[[], str]) -> str:
        """Return the id kept in the run directory, so that a resumed run is the same one."""
        path = self.folder / file
        if not path.exists():
            path.write_text(fresh(), encoding="utf-8")
        return path.read_text(encoding="utf-8")


class _TensorBoard:
    def __init__(self, run: _Opening) -> None:
        self._run = run
        self._opened: Any = None
        self._purge: int | None = None

    def log(self, round: int, metrics: Metrics) -> None:
        writer = self._writer()
        for name, value in metrics.items():
            writer.add_scalar(name, value, round)
        writer.flush()

    def truncate_after(self, round: int) -> None:
        self._purge = round + 1

    def finish(self, summary: Mapping[str, Any]) -> None:
        writer = self._writer()
        for name, values in (("recipe", self._run.recipe), ("summary", summary)):
            text = json.dumps(values, indent=2, default=str)
            writer.add_text(name, "\n".join("    " + line for line in text.splitlines()))
        writer.close()

    def _writer(self) -> Any:
        if self._opened is None:
            board = import_module("torch.utils.tensorboard")
            folder = str(self._run.folder / "tensorboard")
            self._opened = board.SummaryWriter(log_dir=folder, purge_step=self._purge)
        return self._opened


class _Wandb:
    def __init__(self, run: _Opening) -> None:
        self._run = import_module("wandb").init(
            project="fedloom",
            name=run.name,
            id=run.stored_id("wandb_run_id", lambda: uuid.uuid4().hex),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.recipe),
        )
        # wandb's own steps only grow; rounds repeated after a resume need an axis of theirs.
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def log(self, round: int, metrics: Metrics) -> None:
        self._run.log({"round": round, **metrics})

    def truncate_after(self, round: int) -> None:
        """Do nothing: the last value of a round is what wandb shows."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(_flat(summary))
        self._run.finish()


class _Mlflow:
    def __init__(self, run: _Opening) -> None:
        self._client = import_module("mlflow").MlflowClient()
        known = self._client.get_experiment_by_name("fedloom")
        experiment = known.experiment_id if known else self._client.create_experiment("fedloom")

        def create() -> str:
            made = self._client.create_run(experiment, run_name=run.name)
            self._client.log_dict(made.info.run_id, dict(run.recipe), "recipe.json")
            return str(made.info.run_id)

        self._id = run.stored_id("mlflow_run_id", create)

    def log(self, round: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._id, name, value, step=round)

    def truncate_after(self, round: int) -> None:
        """Do nothing: MLflow cannot delete values, and shows the last one of a step."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        for name, value in _flat(summary).items():
            self._client.set_tag(self._id, f"summary.{name}", str(value))
        self._client.set_terminated(self._id)


class _Trackio:
    def __init__(self, run: _Opening) -> None:
        own = run.stored_id("trackio_run_id", lambda: uuid.uuid4().hex)
        self._run = import_module("trackio").init(
            project="fedloom",
            name=f"{run.name}-{own[:6]}",
            resume="allow",
            config=dict(run.recipe),
        )

    def log(self, round: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=round)

    def truncate_after(self, round: int) -> None:
        """Do nothing: trackio cannot delete values."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[_Opening], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}


def _flat(summary: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in summary.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat
