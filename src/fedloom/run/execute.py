"""A whole run: rounds, evaluations, records and checkpoints, from the start or from the last good checkpoint."""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from fedloom.core.protocols import Absence, ClientId, Metrics
from fedloom.evaluation.measure import combine
from fedloom.run.belief import evaluation_doubt
from fedloom.run.checkpoint import Checkpoints
from fedloom.run.environment import phase_memory
from fedloom.run.history import History
from fedloom.run.influence import FILE as INFLUENCE_FILE
from fedloom.run.influence import told_apart
from fedloom.run.loop import Run, advance, begin, measure
from fedloom.run.progress import RoundBar, round_bar
from fedloom.run.seeds import seed_identity, seed_metrics
from fedloom.run.session import Session
from fedloom.run.settings import RunSettings
from fedloom.run.trackers import JsonLines, Tracker


def execute(
    session: Session,
    settings: Mapping[str, Any],
    *,
    trackers: Sequence[Tracker],
    console: Console,
) -> Run[Any]:
    """Run the recipe's rounds in its folder, resuming where a checkpoint says so.

    Args:
        session: The recipe, built.
        settings: The recipe as flat settings; a checkpoint of other settings is refused.
        trackers: Take the metrics of every round.
        console: Where progress and notes go.

    Returns:
        The run after its last round.
    """
    recipe, folder = session.recipe, session.folder
    keep = recipe.run.keep_checkpoints
    checkpoints = Checkpoints(
        folder / "checkpoints", keep=keep, settings=settings, space=seed_identity(session)
    )
    fresh = begin(recipe.algorithm, session.space.start(), recipe.run.seed)
    run = _last_good(checkpoints, fresh, console)
    # What a killed process did after its last checkpoint is done again, and what it did not come to, now.
    session.store.rewind(run.number)
    _prune(session, checkpoints)
    for name in ("metrics.jsonl", "clients.jsonl", INFLUENCE_FILE):
        JsonLines(folder / name).truncate_after(run.number if checkpoints.rounds() else -1)
    recorder = _Recorder(session, trackers, console)
    title = recipe.name
    with round_bar(console, title, done=run.number, total=recipe.run.rounds) as bar:
        if not recorder.history().lines:
            bar.say("measuring the model before training")
            recorder.record(run, recorder.evaluate(run, kinds=("validate", "test")))
            _check_monitor(recipe.run, recorder.history())
            checkpoints.save(run)
        while run.number < recipe.run.rounds and not recorder.stopped():
            run = _round(run, session, recorder, bar)
            checkpoints.save(run)
            _prune(session, checkpoints)
    return run


def _prune(session: Session, checkpoints: Checkpoints) -> None:
    if rounds := checkpoints.rounds():
        session.store.prune(below=rounds[0] + 1)


def _check_monitor(settings: RunSettings, history: History) -> None:
    if settings.patience and not history.of(settings.monitor):
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


def _last_good(checkpoints: Checkpoints, fresh: Run[Any], console: Console) -> Run[Any]:
    if not checkpoints.rounds():
        return fresh
    resumed = checkpoints.load(fresh)
    for reason in resumed.damaged:
        console.print(f"[yellow]left out a damaged checkpoint: {reason}[/]")
    console.print(f"going on after round {resumed.run.number}")
    return resumed.run


class _Recorder:
    """Measures the model and writes down what came of each round."""

    def __init__(self, session: Session, trackers: Sequence[Tracker], console: Console) -> None:
        self.session, self.trackers, self.console = session, trackers, console
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

    def note(self, number: int, absences: Sequence[Absence]) -> None:
        for absence in absences:
            self.console.print(
                f"[yellow]round {number}: {absence.client} is absent: {absence.reason}[/]"
            )

    def say(self, said: str) -> None:
        """Print a note in which names are no markup."""
        self.console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def append(self, file: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to a file of the run."""
        JsonLines(self.session.folder / file).append(rows)

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
        self.append(
            "clients.jsonl",
            (
                {"round": number, "client": client, "split": split, "metrics": dict(metrics)}
                for client, metrics in measured.items()
            ),
        )
