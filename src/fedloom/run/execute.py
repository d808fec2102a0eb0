"""A whole run: rounds, evaluations, records and checkpoints, from the start or from the last good checkpoint.

A round is on the disk before anything of it is sent, be it to be measured or to be trained on: what somebody has seen is
not made a second time, with other replies. Its line in metrics.jsonl, which holds what was measured, comes last; what
else is in it waits in the checkpoint.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom.core.protocols import Absence, ClientId, Metrics
from fedloom.evaluation.measure import combine
from fedloom.privacy.terms import BudgetSpent
from fedloom.run.checkpoint import Checkpoints
from fedloom.run.environment import phase_memory
from fedloom.run.history import History
from fedloom.run.loop import Run, advance, begin, measure
from fedloom.run.privacy import KNOWN_SEED
from fedloom.run.progress import RoundBar, round_bar
from fedloom.run.quiet import covered, is_quiet
from fedloom.run.releases import Releases
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
    if settings.get("algorithm.private.noise_seed") is not None:
        console.print(f"[yellow]{KNOWN_SEED}[/]")
    fresh = begin(recipe.algorithm, session.space.start(), recipe.run.seed)
    run, told = _last_good(checkpoints, fresh, console)
    releases = Releases(checkpoints.folder / "releases")
    run = releases.charge(run, fresh=not checkpoints.rounds())
    # What a killed process did after its last checkpoint is done again, and what it did not come to, now.
    session.store.rewind(run.number)
    _prune(session, checkpoints)
    told_of = _truncate(folder, run.number if checkpoints.rounds() else -1)
    recorder = _Recorder(session, trackers, console)
    title = recipe.name
    with round_bar(console, title, done=run.number, total=recipe.run.rounds) as bar:
        if not recorder.history().lines:
            bar.say("measuring the model before training")
            recorder.record(run, recorder.evaluate(run, kinds=("validate", "test")))
            _check_monitor(recipe.run, recorder.history())
            checkpoints.save(run)
        elif told_of < run.number:
            _tell(run, told, session, recorder, bar)
        while run.number < recipe.run.rounds and not recorder.stopped():
            try:
                run, told = _round(run, session, recorder)
            except BudgetSpent as spent:
                bar.say(f"ended after round {run.number}")
                console.print(f"[yellow]the run ends after round {run.number}: {spent}[/]")
                break
            checkpoints.save(run, told)
            releases.record(run)
            _prune(session, checkpoints)
            _tell(run, told, session, recorder, bar)
    return run


def _truncate(folder: Path, number: int) -> int:
    """Keep the lines of rounds up to `number`; return the last one that was told of, -1 for none."""
    lines = JsonLines(folder / "metrics.jsonl")
    lines.truncate_after(number)
    last = max((int(row["round"]) for row in lines.rows()), default=-1)
    # A round without a line is measured again, client by client.
    JsonLines(folder / "clients.jsonl").truncate_after(last)
    return last


def _prune(session: Session, checkpoints: Checkpoints) -> None:
    if rounds := checkpoints.rounds():
        session.store.prune(below=rounds[0] + 1)


def _check_monitor(settings: RunSettings, history: History) -> None:
    if settings.patience and not history.of(settings.monitor):
        known = ", ".join(history.measured())
        raise ValueError(f"run.monitor must be one of {known}, got {settings.monitor!r}")


def _round(
    run: Run[Any], session: Session, recorder: "_Recorder"
) -> tuple[Run[Any], dict[str, float]]:
    """Return the run after one more round, and what is told of it before it is measured."""
    recipe, began = session.recipe, time.perf_counter()
    with phase_memory("train") as memory:
        run, metrics, absences = advance(
            run,
            recipe.algorithm,
            session.engine,
            population=session.learners,
            sampler=recipe.cohort,
            min_replies=recipe.run.min_replies,
        )
    spent = {**memory, "time/train_seconds": time.perf_counter() - began}
    recorder.note(run.number, absences)
    return run, {**seed_metrics(session, run), **metrics, **spent}


def _tell(
    run: Run[Any],
    told: Metrics,
    session: Session,
    recorder: "_Recorder",
    bar: RoundBar,
) -> None:
    """Measure the model after a round, if that is due, and write down the round."""
    last = run.number == session.recipe.run.rounds
    every = session.recipe.evaluation.every
    due = last or (every > 0 and run.number % every == 0)
    measured = recorder.evaluate(run, kinds=("validate", "test") if due else ())
    recorder.record(run, {**told, **measured})
    bar.advance(run.number, {**told, **measured})


def _last_good(
    checkpoints: Checkpoints, fresh: Run[Any], console: Console
) -> tuple[Run[Any], Metrics]:
    if not checkpoints.rounds():
        return fresh, {}
    resumed = checkpoints.load(fresh)
    for reason in resumed.damaged:
        console.print(f"[yellow]left out a damaged checkpoint: {reason}[/]")
    console.print(f"going on after round {resumed.run.number}")
    return resumed.run, resumed.extra


class _Recorder:
    """Measures the model and writes down what came of each round."""

    def __init__(self, session: Session, trackers: Sequence[Tracker], console: Console) -> None:
        self.session, self.trackers, self.console = session, trackers, console
        self.quiet = is_quiet(session.recipe.algorithm)
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
            if measured and not self.quiet:
                self._write_clients(run.number, split, measured)
            if measured:
                out |= {f"{split}/{n}": v for n, v in combine(measured.values()).items()}
        return out

    def record(self, run: Run[Any], metrics: Metrics) -> None:
        now = time.perf_counter()
        line = {**metrics, "time/round_seconds": now - self.last, "seconds": now - self.began}
        self.last = now
        line = dict(covered(line)) if self.quiet else line
        # metrics.jsonl, which is the first, last: with its line a round is never told again.
        for tracker in reversed(self.trackers):
            tracker.log(run.number, line)

    def note(self, number: int, absences: Sequence[Absence]) -> None:
        for absence in absences:
            self.console.print(
                f"[yellow]round {number}: {absence.client} is absent: {absence.reason}[/]"
            )

    def _write_clients(self, number: int, split: str, measured: Mapping[ClientId, Metrics]) -> None:
        JsonLines(self.session.folder / "clients.jsonl").append(
            {"round": number, "client": client, "split": split, "metrics": dict(metrics)}
            for client, metrics in measured.items()
        )
