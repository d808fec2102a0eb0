"""A whole run: rounds, evaluations, records and checkpoints, from the start or from the last good checkpoint.

A round is on the disk before anything of it is sent, be it to be measured or to be trained on: what somebody has seen is
not made a second time, with other replies. Its line in metrics.jsonl, which holds what was measured, comes last; what
else is in it waits in the checkpoint.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from fedloom.core.description import describe
from fedloom.core.metrics import MEASURED_SPLITS
from fedloom.core.protocols import ClientFailure, ClientId, Metrics, Split
from fedloom.evaluation.measure import combine
from fedloom.privacy.terms import BudgetSpent
from fedloom.rounds.buffered import BufferedRun
from fedloom.rounds.buffered_sites import step_on
from fedloom.rounds.checkpoint import Checkpoints
from fedloom.rounds.costs import FILE as COSTS_FILE
from fedloom.rounds.costs import metered, split_costs
from fedloom.rounds.emulation import AlignmentStage
from fedloom.rounds.loop import Run, advance, draw, measure
from fedloom.rounds.plausibility import implausible_evaluation
from fedloom.rounds.privacy import Releases, covered
from fedloom.rounds.received import NOTE, keeping
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.restore import Standing
from fedloom.rounds.server_metrics import FILE as INFLUENCE_FILE
from fedloom.rounds.server_metrics import seed_metrics, split_influence
from fedloom.rounds.session import Session
from fedloom.server.buffering import Buffered
from fedloom.tracking.environment import phase_memory
from fedloom.tracking.metrics_log import MetricsLog
from fedloom.tracking.progress import RoundBar, round_bar
from fedloom.tracking.records import RECORDS, records, unaccounted
from fedloom.tracking.run_log import RunLog
from fedloom.tracking.trackers import Tracker


@dataclass(frozen=True)
class FinishedRound:
    """A round that is on the disk with all that was measured after it."""

    number: int
    """From 1."""
    metrics: Metrics
    """Its line of metrics.jsonl."""
    failures: Sequence[ClientFailure]
    """Tasks of it, training and evaluation, that brought no reply; of a round taken up from a killed process, those of
    evaluation alone."""
    stop: Callable[[], None]
    """Ends the run after this round: it delivers its model, and can be resumed."""


Callback = Callable[[FinishedRound], object]
"""Called after each round; what it returns is not read, and what it raises ends the run as a killed process would."""


class Training:
    """The rounds of a run in its folder, from where it stands, one at a time.

    Args:
        session: The recipe, built.
        stands: Where to go on from.
        trackers: Take the metrics of every round.
        console: Where progress and notes go.
        stage: What the server does between rounds, if anything.
        log: Takes what a terminal shows as a bar.
    """

    def __init__(
        self,
        session: Session,
        stands: Standing,
        *,
        trackers: Sequence[Tracker],
        console: Console,
        stage: AlignmentStage | None = None,
        log: RunLog | None = None,
    ) -> None:
        self.session, self.checkpoints = session, stands.checkpoints
        self.run: Run[Any] = stands.run
        """As the last finished round left it."""
        self.begun = False
        self._stands, self._trackers, self._console = stands, trackers, console
        self._stage = stage
        self._note = log.write if log is not None else lambda _: None
        self._releases = Releases(stands.checkpoints.folder / "releases", session.recipe.algorithm)
        self._unreported: Metrics | None = None
        self._stopped = False

    def rounds(self, until: int | None = None) -> Iterator[FinishedRound]:
        """Yield each round once it is finished, until the recipe's last one, early stopping or `stop`.

        Args:
            until: The round to end after, if that is before the recipe's last.
        """
        recipe, recorder = self.session.recipe, self._begin()
        self._stopped = False
        done, total = self.run.number, min(recipe.run.rounds, until or recipe.run.rounds)
        console, name = self._console, recipe.name
        with round_bar(console, name, done=done, total=total, note=self._note) as bar:
            if not recorder.history().lines:
                self._measure_before(recorder, bar)
            elif self._unreported is not None:
                yield self._tell(self._unreported, recorder, bar)
            while not self._stopped and self.run.number < total and not recorder.stopped():
                try:
                    self._unreported = self._next(recorder)
                except BudgetSpent as spent:
                    bar.say(f"ended after round {self.run.number}")
                    message = f"the run ends after round {self.run.number}: {spent}"
                    self._console.print(Text(message, "yellow"))
                    break
                yield self._tell(self._unreported, recorder, bar)

    def _begin(self) -> "_Recorder":
        """Return who writes down the rounds; before the first, bring the folder to where the run stands."""
        if not self.begun:
            _say_where(self.session.recipe, self._stands, self._console)
            self.run = self._releases.charge(self.run, fresh=self._stands.fresh)
            # What a killed process did after its last checkpoint is done again, and what it did not come to, now.
            self.session.store.rewind(self.run.number)
            _prune(self.session, self.checkpoints)
            recorded = _truncate(self.session.folder, -1 if self._stands.fresh else self.run.number)
            if 0 <= recorded < self.run.number:
                self._unreported = self._stands.metrics
            self.begun = True
        return self._recorder()

    def _recorder(self) -> "_Recorder":
        return _Recorder(self.session, self._trackers, self._console, self._stage)

    def _measure_before(self, recorder: "_Recorder", bar: RoundBar) -> None:
        if self._stage is not None:
            bar.say("aligning the emulator before training")
            self.run = self._stage.before(self.run)
        recipe = self.session.recipe
        due = recipe.measures_after(0)
        if due:
            bar.say("measuring the model before training")
        recorder.record(self.run, recorder.evaluate(self.run) if due else {})
        if due and recipe.run.patience:
            recorder.history().check_measured(self.session.recipe.run.monitor)
        self.checkpoints.save(self.run, recorder.beside(self.run))

    def _next(self, recorder: "_Recorder") -> Metrics:
        """Run one more round and save it; return what is told of it before it is measured."""
        recorder.failures.clear()
        run, metrics = _round(self.run, self.session, recorder)
        if self._stage is not None:
            run, aligned = self._stage.after(run)
            metrics = {**metrics, **aligned}
        self.checkpoints.save(run, {**recorder.beside(run), "told": metrics})
        self._releases.record(run)
        _prune(self.session, self.checkpoints)
        self.run = run
        return metrics

    def _tell(self, reported: Metrics, recorder: "_Recorder", bar: RoundBar) -> FinishedRound:
        """Measure the model after a round, if that is due, and write down the round."""
        run, due = self.run, self.session.recipe.measures_after(self.run.number)
        measured = recorder.evaluate(run) if due else {}
        reported, costs = split_costs(reported)
        metrics, influence = split_influence(reported)
        if costs:
            recorder.append(COSTS_FILE, [{"round": run.number, "costs": costs}])
        if influence:
            recorder.append(INFLUENCE_FILE, [{"round": run.number, "influence": dict(influence)}])
        line = recorder.record(run, {**metrics, **measured})
        bar.advance(run.number, {**metrics, **measured})
        self._unreported = None
        return FinishedRound(run.number, line, tuple(recorder.failures), self._stop)

    def _stop(self) -> None:
        self._stopped = True

    def measure_end(self) -> None:
        """Measure the last round's model where a run ends in a round in which that was not due."""
        if self.session.recipe.measures_after(self.run.number):
            return
        recorder = self._recorder()
        log = records(self.session.folder / "metrics.jsonl")
        *_, line = log.rows()
        if recorder.quiet or any(name.startswith(MEASURED_SPLITS) for name in line):
            return
        recorder.last -= line["time/round_seconds"]
        measured = recorder.evaluate(self.run)
        # The round's line is written anew: a process that is killed in between tells of it as of any other.
        log.truncate_after(self.run.number - 1)
        recorder.lines["metrics.jsonl"] -= 1
        recorder.record(self.run, {**{n: v for n, v in line.items() if n != "round"}, **measured})


def _say_where(recipe: Recipe, stands: Standing, console: Console) -> None:
    kept = [NOTE] if recipe.audit == "record" else []
    for note in (*describe(recipe.algorithm).notes, *kept):
        console.print(Text(note, "yellow"))
    for reason in stands.damaged:
        console.print(Text(f"left out a damaged checkpoint: {reason}", "yellow"))
    if not stands.fresh:
        console.print(f"going on after round {stands.run.number}")


def _truncate(folder: Path, number: int) -> int:
    """Keep the lines of rounds up to `number` that are told of in full; return the last one, -1 for none."""
    lines, clients = (records(folder / name) for name in ("metrics.jsonl", "clients.jsonl"))
    lines.truncate_after(number)
    rows = lines.rows()
    last = max((int(row["round"]) for row in rows), default=-1)
    of_last = [row for row in clients.rows() if row["round"] == last]
    if rows and last == number and unaccounted(rows[-1], of_last):
        lines.truncate_after(number - 1)
        last = max((int(row["round"]) for row in rows[:-1]), default=-1)
    # A round without a line is measured again, client by client.
    for name in RECORDS:
        records(folder / name).truncate_after(last)
    return last


def _prune(session: Session, checkpoints: Checkpoints) -> None:
    if rounds := checkpoints.rounds():
        session.store.prune(below=rounds[0] + 1)


def _round(
    run: Run[Any], session: Session, recorder: "_Recorder"
) -> tuple[Run[Any], dict[str, float]]:
    """Return the run after one more round, and what is told of it before it is measured."""
    recipe, began, number = session.recipe, time.perf_counter(), run.number + 1
    engine = metered(keeping(session.engine, recipe, session.folder, number))
    with phase_memory("train") as memory:
        terms: dict[str, Any] = {
            "population": session.learners,
            "sampler": session.sampler,
            "min_replies": recipe.run.min_replies,
            "max_update_norm": recipe.run.max_update_norm,
            "metrics": recipe.evaluation.table,
            "say": lambda message: recorder.say(f"round {number}: {message}"),
        }
        clock, mode = session.durations(), recipe.run.mode
        timed: Metrics = {}
        if isinstance(mode, Buffered):
            assert isinstance(run, BufferedRun)
            run, metrics, failures = step_on(
                run, recipe.algorithm, engine, mode=mode, durations=clock, **terms
            )
        else:
            if recipe.clock is not None:
                round = draw(run, session.learners, session.sampler)
                timed = {"time/virtual_seconds": clock.of_cohort(round)}
            run, metrics, failures = advance(run, recipe.algorithm, engine, **terms)
        session.store.flush()
    spent = {**memory, "time/train_seconds": time.perf_counter() - began}
    recorder.note(run.number, failures)
    costs = {} if recorder.quiet else engine.costs(session)
    return run, {**seed_metrics(session, run), **metrics, **timed, **spent, **costs}


class _Recorder:
    """Measures the model and writes down what came of each round."""

    def __init__(
        self,
        session: Session,
        trackers: Sequence[Tracker],
        console: Console,
        stage: AlignmentStage | None,
    ) -> None:
        self.session, self.trackers, self.console = session, trackers, console
        self.stage = stage
        self.failures: list[ClientFailure] = []
        self.quiet = describe(session.recipe.algorithm).quiet
        self.lines = {name: len(records(session.folder / name).rows()) for name in RECORDS}
        self.began = time.perf_counter() - self.history().total("time/round_seconds")
        self.last = time.perf_counter()

    def history(self) -> MetricsLog:
        return MetricsLog.read(
            self.session.folder / "metrics.jsonl", self.session.recipe.evaluation.table
        )

    def stopped(self) -> bool:
        recipe, history = self.session.recipe, self.history()
        if recipe.run.patience and history.measured():
            history.check_measured(recipe.run.monitor)
        # A run that was ended in another round was measured there, which an uninterrupted one is not.
        due = [line for line in history.lines if recipe.measures_after(int(line["round"]))]
        return replace(history, lines=due).should_stop(recipe.run.monitor, recipe.run.patience)

    def evaluate(self, run: Run[Any]) -> Metrics:
        """Measure the judging clients, or those of them that are drawn; return the means over them, by split.

        Where the server measures on text of its own, what it finds is with it.
        """
        began = time.perf_counter()
        with phase_memory("evaluate") as memory:
            out = self._measured(run)
            if self.stage is not None:
                out |= self.stage.measured(run)
        if not out:
            return {}
        return {**out, **memory, "time/evaluation_seconds": time.perf_counter() - began}

    def _measured(self, run: Run[Any]) -> dict[str, float]:
        out: dict[str, float] = {}
        counts = self.session.counts
        splits: list[Split | Literal["unseen"]] = ["test"]
        if self.session.recipe.evaluation.validation:
            splits.insert(0, "validation")
        if self.session.unseen:
            splits.append("unseen")
        for split in splits:
            held_out = {
                c: n.validation if split == "validation" else n.test for c, n in counts.items()
            }
            clients = self.session.drawn_judges(run.number, split)
            if not clients:
                continue
            measured, failures = measure(
                run,
                self.session.recipe.algorithm,
                self.session.engine,
                kind="validate" if split == "validation" else "test",
                population=self.session.engine.population(),
                clients=clients,
            )
            self.note(run.number, failures)
            measured = self._believed(run.number, measured, held_out)
            if measured and not self.quiet:
                self._write_clients(run.number, split, measured)
            if measured:
                means = combine(measured.values(), self.session.recipe.evaluation.table)
                out |= {f"{split}/{n}": v for n, v in means.items()}
        return out

    def record(self, run: Run[Any], metrics: Metrics) -> Metrics:
        """Write down a round and return its line."""
        now = time.perf_counter()
        line = {**metrics, "time/round_seconds": now - self.last, "seconds": now - self.began}
        self.last = now
        line = dict(covered(line)) if self.quiet else line
        # metrics.jsonl, which is the first, last: with its line a round is never told again.
        for tracker in reversed(self.trackers):
            tracker.log(run.number, line)
        self.lines["metrics.jsonl"] += 1
        return line

    def beside(self, run: Run[Any]) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the run: which client state and how many records belong to it."""
        return {
            "client_state": self.session.store.latest_rounds(before=run.number + 1),
            "lines": self.lines,
        }

    def note(self, number: int, failures: Sequence[ClientFailure]) -> None:
        self.failures += failures
        for failure in failures:
            message = f"round {number}: {failure.client} is absent: {failure.reason}"
            self.console.print(Text(message, "yellow"))

    def say(self, message: str) -> None:
        """Print a note in which names are no markup."""
        self.console.print(Text(message, "yellow"), soft_wrap=True)

    def append(self, file: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add lines to a file of the run's records, and count them."""
        self.lines[file] += len(rows)
        records(self.session.folder / file).append(rows)

    def _believed(
        self, number: int, measured: Mapping[ClientId, Metrics], held_out: Mapping[ClientId, int]
    ) -> Mapping[ClientId, Metrics]:
        """Return the evaluations that weigh no more than what their clients declared; say who is left out."""
        longest, believed = self.session.recipe.most_tokens, dict[ClientId, Metrics]()
        usual = statistics.median([held_out[client] for client in measured] or [0])
        for client, metrics in measured.items():
            doubt = implausible_evaluation(
                metrics, held_out=held_out[client], usual=usual, most_tokens=longest
            )
            if doubt is None:
                believed[client] = metrics
            else:
                self.say(f"round {number}: the evaluation of {client} is left out: {doubt}")
        return believed

    def _write_clients(self, number: int, split: str, measured: Mapping[ClientId, Metrics]) -> None:
        rows = [
            {"round": number, "client": client, "split": split, "metrics": dict(metrics)}
            for client, metrics in measured.items()
        ]
        self.append("clients.jsonl", rows)
