"""One command's worth of work: a run with its baselines, from nothing or from where a killed process left it."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedloom.client.fast.kernels import choose_kernels
from fedloom.core.files import write_atomic
from fedloom.core.metrics import METRICS, MetricTable
from fedloom.report.page import write_report
from fedloom.results.by_label import check_label
from fedloom.results.finish import finish, record_setup
from fedloom.run.binding import changed_sites
from fedloom.run.lock import held
from fedloom.run.loop import begin, draw
from fedloom.run.notes import said, write_note
from fedloom.run.quorum import check_quorum
from fedloom.run.recipe_settings import Baseline, Recipe
from fedloom.run.restore import Standing, standing
from fedloom.run.session import Session, build
from fedloom.run.training import train
from fedloom.tracking.metric_format import duration, measures, shown
from fedloom.tracking.trackers import check_trackers, make_trackers
from fedloom.tracking.units import human_bytes

_FREE = (
    "name",
    "description",
    # A model is known by the hash of its weights, wherever it lies.
    "model.name",
    "model.revision",
    "run.trackers",
    "run.baselines",
    "run.samples",
    "run.keep_checkpoints",
    "run.patience_seconds",
    "engine.flower.deadline",
    "engine.flower.patience",
    "evaluation.by",
)
"""Settings that may differ at resume because no number of the run depends on them."""


@dataclass(frozen=True)
class Job:
    """A recipe, its YAML and its flat settings."""

    recipe: Recipe
    text: str
    settings: Mapping[str, Any]

    def binding(self) -> dict[str, Any]:
        """Return the settings a checkpoint is bound to."""
        bound = {k: v for k, v in self.settings.items() if k not in _FREE}
        if self.recipe.local.schedule == "constant" and not self.recipe.local.warmup_rounds:
            bound.pop("run.rounds")
        return bound


Connect = Callable[[Session, Console], AbstractContextManager[Session]]
"""Gives a session the engine that its recipe asks for, and ends what it started for that."""


def conduct(
    job: Job,
    folder: Path,
    *,
    baseline: Callable[[Baseline, Mapping[str, Any]], Job],
    connect: Connect,
    console: Console,
    anyway: bool = False,
) -> Mapping[str, Mapping[str, Any]]:
    """Run the job and its baselines, and write the report.

    Args:
        job: What to run, or to go on with.
        folder: The run's folder.
        baseline: Makes the job of a baseline from its name and the summary of the run.
        connect: Connects to clients that are not in this process.
        console: Where progress and notes go.
        anyway: Whether to go on although data or model are not what the run was begun with.

    Returns:
        The summaries by name; "" is the job's own.

    Raises:
        InUse: where another process writes into the folder.
    """
    with held(folder):
        summaries = {"": _one(job, folder, connect, console, anyway=anyway)}
        for name in job.recipe.run.baselines:
            console.print(
                Text.assemble("baseline ", (name, "bold"), ": same data, seed and evaluation")
            )
            made, below = baseline(name, summaries[""]), folder / "baselines" / name
            summaries[name] = _one(made, below, connect, console, anyway=anyway)
        write_report(folder)
    return summaries


def _one(
    job: Job, folder: Path, connect: Connect, console: Console, *, anyway: bool
) -> Mapping[str, Any]:
    began = time.perf_counter()
    check_trackers(job.recipe.run.trackers)
    session = build(job.recipe, folder)
    # Nothing is started or written before the recipe is known to fit its data and what the folder holds.
    if not job.recipe.elsewhere:
        _check_data(session)
    # Width and kernels decide the order of sums; `auto` is a measurement that another day may turn out otherwise.
    kernels = choose_kernels(job.recipe.local, session.space.model)
    bound = {
        **job.binding(),
        "trainer.width": session.trainer.width,
        "local.kernels": kernels,
    }
    stands = standing(session, bound, anyway=anyway)
    with connect(session, console) as connected:
        return _connected(job, connected, stands, console, began=began)


def _check_data(session: Session) -> None:
    check_label(session)
    check_quorum(session.recipe.algorithm, session.recipe.cohort, len(session.learners))
    draw(
        begin(session.recipe.algorithm, session.space.start(), 0),
        session.learners,
        session.recipe.cohort,
    )


def _connected(
    job: Job, session: Session, stands: Standing, console: Console, *, began: float
) -> Mapping[str, Any]:
    folder = session.folder
    if job.recipe.elsewhere:
        _check_data(session)
    # A baseline has the same data and model.
    if folder.parent.name != "baselines":
        _say_how_read(session, console)
    if differences := (*stands.differences, *changed_sites(session)):
        note = write_note(folder, f"resume after round {stands.run.number}", differences)
        console.print(said(note), style="yellow", markup=False, highlight=False)
    record_setup(session)
    write_atomic(folder / "recipe.yaml", job.text.encode())
    names = job.recipe.run.trackers
    trackers = make_trackers(folder, names, name=job.recipe.name)
    run = train(session, stands, trackers=trackers, console=console)
    summary = finish(session, run, began=began)
    for tracker in trackers:
        tracker.finish(summary)
    return summary


def _say_how_read(session: Session, console: Console) -> None:
    manifest = session.federation.manifest
    if manifest.losses.formats:
        console.print(f"rows read as {manifest.losses.read_as()}", markup=False, highlight=False)
    for line in filter(None, (*manifest.left_out(), session.space.left_frozen)):
        console.print(line, style="yellow", markup=False, highlight=False)


def results_table(
    summaries: Mapping[str, Mapping[str, Any]], metrics: MetricTable = METRICS
) -> Table:
    """Return the result of a run beside its baselines: before, after, bytes, time; `metrics` are the run's."""
    own = summaries[""]
    table = Table(
        title=Text(f"{own['name']}: {own['rounds']} rounds, {own['num_clients']} clients"),
        title_justify="left",
    )
    table.add_column("metric")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    others = [name for name in summaries if name]
    for name in others:
        table.add_column(name, justify="right")
    for metric in map(metrics.of, measures(own["final"], metrics)):
        row = [own["before"].get(metric.name), own["final"][metric.name]]
        row += [summaries[name]["final"].get(metric.name) for name in others]
        table.add_row(metric.title, *(shown(metric, value) for value in row))
    for metric in map(metrics.of, own["worst"]):
        found = (s["worst"].get(metric.name) for s in summaries.values())
        cells = (f"{shown(metric, w['result'])} ({w['value']})" if w else "" for w in found)
        table.add_row(f"Worst {metric.title.lower()}", "", *map(Text, cells))
    if drawn := own.get("evaluated"):
        said = f"{drawn['clients']} of {drawn['of']}, drawn for each evaluation"
        table.add_row("Clients measured", "", said)
    if any(s.get("rounds_unchanged") for s in summaries.values()):
        unchanged = (f"{s.get('rounds_unchanged', 0)} of {s['rounds']}" for s in summaries.values())
        table.add_row("Rounds that changed nothing", "", *unchanged, style="yellow")
    counted = all("upload_bytes" in s for s in summaries.values())
    for label, key in (("Bytes up", "upload_bytes"), ("Bytes down", "download_bytes")):
        if counted:
            table.add_row(label, "", *(human_bytes(s[key]) for s in summaries.values()))
    if any(s.get("privacy") for s in summaries.values()):
        told = (s.get("privacy") or {"short": ""} for s in summaries.values())
        table.add_row("Privacy", "", *(privacy["short"] for privacy in told))
    if counted:
        times = (duration(s["train_seconds"]) for s in summaries.values())
        table.add_row("Training time", "", *times)
    return table
