"""A whole run: rounds, evaluations, records and checkpoints, from the start or from the last good checkpoint."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from fedloom.core.protocols import Absence, ClientId, Metrics
from fedloom.evaluation.measure import combine
from fedloom.run.belief import evaluation_doubt
from fedloom.run.checkpoint import Checkpoints
from fedloom.run.environment import phase_memory
from fedloom.run.history import History
from fedloom.run.influence import FILE as INFLUENCE_FILE
from fedloom.run.influence import told_apart
from fedloom.run.loop import Run, advance, measure
from fedloom.run.progress import RoundBar, round_bar
from fedloom.run.records import RECORDS, records
from fedloom.run.restore import Standing
from fedloom.run.seeds import seed_metrics
from fedloom.run.session import Session
from fedloom.run.settings import RunSettings
from fedloom.run.trackers import Tracker


def execute(
    session: Session,
    stands: Standing,
    *,
    trackers: Sequence[Tracker],
    console: Console,
) -> Run[Any]:
    """Run the recipe's rounds in its folder, from where it stands.

    Args:
        session: The recipe, built.
        stands: Where to go on from.
        trackers: Take the metrics of every round.
        console: Where progress and notes go.

    Returns:
        The run after its last round.
    """
    recipe, checkpoints, run = session.recipe, stands.checkpoints, stands.run
    for reason in stands.damaged:
        console.print(Text(f"left out a damaged checkpoint: {reason}", "yellow"))
    if not stands.fresh:
        console.print(f"going on after round {run.number}")
    # What a killed process did after its last checkpoint is done again, and what it did not come to, now.
    session.store.rewind(run.number)
    _prune(session, checkpoints)
    for name in RECORDS:
        records(session.folder / name).truncate_after(-1 if stands.fresh else run.number)
    recorder = _Recorder(session, trackers, console, dict(stands.lines))
    with round_bar(console, recipe.name, done=run.number, total=recipe.run.rounds) as bar:
        if not recorder.history().lines:
            bar.say("measuring the model before training")
            recorder.record(run, recorder.evaluate(run, kinds=("validate", "test")))
            _check_monitor(recipe.run, recorder.history())
            checkpoints.save(run, recorder.beside(run))
        while run.number < recipe.run.rounds and not recorder.stopped():
            run = _round(run, session, recorder, bar)
            checkpoints.save(run, recorder.beside(run))
            _prune(session, checkpoints)
    return run


def _prune(session: Session, checkpoints: Checkpoints) -> None:
    if rounds := checkpoints.rounds():
        session.store.prune(below=rounds[0] + 1)


def _check_monitor(settings: RunSettings, history: History) -> None:
    if settings.patience and settings.monitor not in history.measured():
        known = ", ".join(history.measured())
        raise ValueError(f"run.monitor must be one of {known}, got {settings.monitor!r}")


def _round(run: Run[Any], session: Session, recorder: "_Recorder", bar: RoundBar) -> Run[Any]:
    recipe, began, number = session.recipe, time.perf_counter(), run.number + 1
    with phase_memory("train") as memory:
        run, metrics, absences = advance(
            run,
            recipe.algorithm,
            session.engine,
            population=session.learners,
            sampler=recipe.cohort,
            min_replies=recipe.run.min_replies,
            max_update_norm=recipe.run.max_update_norm,
            say=lambda said: recorder.say(f"round {number}: {said}"),
        )
    metrics, influence = told_apart(metrics)
    spent = {**memory, "time/train_seconds": time.perf_counter() - began}
    recorder.note(run.number, absences)
    if influence:
        recorder.append(INFLUENCE_FILE, [{"round": run.number, "influence": dict(influence)}])
    last = run.number == recipe.run.rounds
    every = recipe.evaluation.every
    due = last or (every > 0 and run.number % every == 0)
    measured = recorder.evaluate(run, kinds=("validate", "test") if due else ())
    recorder.record(run, {**seed_metrics(session, run), **metrics, **spent, **measured})
    bar.advance(run.number, {**metrics, **measured})
    return run


class _Recorder:
    """Measures the model and writes down what came of each round."""

    def __init__(
        self,
        session: Session,
        trackers: Sequence[Tracker],
        console: Console,
        lines: dict[str, int],
    ) -> None:
        self.session, self.trackers, self.console = session, trackers, console
        self.lines = lines
        self.began = time.perf_counter() - self.history().total("time/round_seconds")
        self.last = time.perf_counter()

    def history(self) -> History:
        return History.read(self.session.folder / "metrics.jsonl")

    def stopped(self) -> bool:
        settings = self.session.recipe.run
        return self.history().should_stop(settings.monitor, settings.patience)

    def evaluate(self, run: Run[Any], *, kinds: Sequence[str]) -> Metrics:
        """Measure every judging client; return the means over all of them, by split."""
        began = time.perf_counter()
        with phase_memory("evaluate") as memory:
            out = self._measured(run, kinds)
        if not out:
            return {}
        return {**out, **memory, "time/evaluation_seconds": time.perf_counter() - began}

    def _measured(self, run: Run[Any], kinds: Sequence[str]) -> dict[str, float]:
        out: dict[str, float] = {}
        counts = self.session.counts
        for kind in kinds:
            split = "test" if kind == "test" else "validation"
            if split == "validation" and not self.session.recipe.evaluation.validation:
                continue
            held_out = {c: n.test if split == "test" else n.validation for c, n in counts.items()}
            clients = [c for c in self.session.judges if held_out[c]]
            if not clients:
                continue
            measured, absences = measure(
                run,
                self.session.recipe.algorithm,
                self.session.engine,
                kind="test" if kind == "test" else "validate",
                population=self.session.engine.population(),
                clients=clients,
            )
            self.note(run.number, absences)
            measured = self._believed(run.number, measured, held_out)
            if measured:
                self._write_clients(run.number, split, measured)
                out |= {f"{split}/{n}": v for n, v in combine(measured.values()).items()}
        return out

    def record(self, run: Run[Any], metrics: Metrics) -> None:
        now = time.perf_counter()
        line = {**metrics, "time/round_seconds": now - self.last, "seconds": now - self.began}
        self.last = now
        for tracker in self.trackers:
            tracker.log(run.number, line)
        self.lines["metrics.jsonl"] += 1

    def beside(self, run: Run[Any]) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the run: which memory and how many records belong to it."""
        return {"memory": self.session.store.kept(before=run.number + 1), "lines": self.lines}

    def note(self, number: int, absences: Sequence[Absence]) -> None:
        for absence in absences:
            said = f"round {number}: {absence.client} is absent: {absence.reason}"
            self.console.print(Text(said, "yellow"))

    def say(self, said: str) -> None:
        """Print a note in which names are no markup."""
        self.console.print(Text(said, "yellow"), soft_wrap=True)

    def append(self, file: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add lines to a file of the run's records, and count them."""
        self.lines[file] += len(rows)
        records(self.session.folder / file).append(rows)

    def _believed(
        self, number: int, measured: Mapping[ClientId, Metrics], held_out: Mapping[ClientId, int]
    ) -> Mapping[ClientId, Metrics]:
        """Return the evaluations that weigh no more than what their clients declared; say who is left out."""
        longest, kept = self.session.recipe.data.max_length, dict[ClientId, Metrics]()
        usual = statistics.median([held_out[client] for client in measured] or [0])
        for client, metrics in measured.items():
            doubt = evaluation_doubt(
                metrics, held_out=held_out[client], usual=usual, max_length=longest
            )
            if doubt is None:
                kept[client] = metrics
            else:
                self.say(f"round {number}: the evaluation of {client} is left out: {doubt}")
        return kept

    def _write_clients(self, number: int, split: str, measured: Mapping[ClientId, Metrics]) -> None:
        rows = [
            {"round": number, "client": client, "split": split, "metrics": dict(metrics)}
            for client, metrics in measured.items()
        ]
        self.append("clients.jsonl", rows)
