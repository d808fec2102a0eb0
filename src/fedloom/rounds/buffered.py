"""Rounds in which nobody waits: the server steps on the first answers that are there, see `server.buffering`.

In a simulation an event clock says who answers when. It looks at recipe and seed only, so that the clients that begin before
one step of the server can train together, in one batch, though they begin one after another; what came of it lies in the
run, and in its checkpoint, until its time has come. A state that clients keep is written when its training is computed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from fedloom.core.description import replayed_by
from fedloom.core.metrics import METRICS, MetricTable
from fedloom.core.protocols import (
    Algorithm,
    ClientFailure,
    ClientId,
    Delivery,
    Engine,
    Metrics,
    Params,
    Profile,
    Reply,
    Round,
    State,
)
from fedloom.core.randomness import derive
from fedloom.rounds.clock import Durations
from fedloom.rounds.loop import Run, draw, take_up, tasks
from fedloom.server.buffering import Buffered
from fedloom.server.samplers import Sampler

_DRAWS = 20
"""Cohorts that are drawn, in one step, in search of a client that does not train already."""


@dataclass(frozen=True)
class Flight:
    """A client that trains, and what it will answer."""

    began: int
    """Steps of the server before the model that it was sent."""
    lands: float
    """When it answers, in virtual seconds since the run began."""
    answer: Reply | ClientFailure
    """With `delta` in the place of what else was sent."""
    sent: Params
    """What it began at, where whole models are mixed; else nothing."""


@dataclass(frozen=True)
class BufferedRun(Run[State]):
    """A run between two steps of the server, while clients train."""

    holds: ClassVar[tuple[type, ...]] = (Flight, Reply, ClientFailure)
    """What of it a checkpoint may meet besides what a fresh one is made of."""

    seconds: float = 0.0
    """The event clock at the last step."""
    flights: Mapping[ClientId, Flight] = field(default_factory=dict)
    """Who trains now."""


def buffered(run: Run[State]) -> BufferedRun[State]:
    """Return a run that is not begun as one without waiting."""
    return BufferedRun(run.number, run.seed, run.state)


@dataclass
class Timeline:
    """Who begins and who answers before one step of the server, in order; nothing that clients learn changes it."""

    round: Round
    now: float
    lands: dict[ClientId, float]
    """When those who train answer."""
    places: int
    """How many train at once."""
    cohort: Callable[[int], Sequence[ClientId]]
    """Draws the cohort of a seed."""
    duration: Callable[[ClientId], float]
    landed: list[ClientId] = field(default_factory=list)
    """Who answered, in order."""
    started: list[ClientId] = field(default_factory=list)
    """Who began."""
    _draws: int = 0

    def next(self) -> ClientId | None:
        """Return who answers next; None where nobody trains and nobody can begin.

        All who answer at one instant do before anybody begins, and who answered begins again after the step alone.
        """
        if min(self.lands.values(), default=float("inf")) > self.now:
            self._fill()
        if not self.lands:
            return None
        client = min(self.lands, key=lambda client: (self.lands[client], client))
        self.now = max(self.now, self.lands.pop(client))
        self.landed.append(client)
        return client

    def _fill(self) -> None:
        """Let clients of the next cohorts begin in all places that are free."""
        able = self.round.population.keys() - self.lands.keys() - set(self.landed)
        while able and len(self.lands) < self.places and self._draws < _DRAWS:
            seed = self.round.seed
            seed = derive(seed, "again", self._draws) if self._draws else seed
            self._draws += 1
            drawn = [client for client in self.cohort(seed) if client in able]
            free = self.places - len(self.lands)
            # Cohorts are sorted by name, which is to favour nobody.
            if len(drawn) > free:
                drawn = sorted(drawn, key=lambda client: derive(seed, client))[:free]
            for client in drawn:
                self.lands[client] = self.now + self.duration(client)
                self.started.append(client)
            able -= set(drawn)


@dataclass
class _Trainings:
    """The answers of those who train, those of this step computed when they are asked for."""

    run: BufferedRun[Any]
    algorithm: Algorithm[Any]
    engine: Engine
    round: Round
    mixes_models: bool
    flights: dict[ClientId, Flight]
    bytes: dict[str, int] = field(default_factory=lambda: {"download": 0, "upload": 0})

    def train(self, lands: Mapping[ClientId, float]) -> None:
        """Let clients that began in this step train, together."""
        cohort = tuple(sorted(lands))
        if not cohort:
            return
        sent = self.algorithm.broadcast(self.run.state, replace(self.round, cohort=cohort))
        asked = tasks("train", self.round, sent)
        for task, delivery in zip(asked, self.engine.run(asked), strict=True):
            self.bytes["download"] += delivery.download_bytes
            self.bytes["upload"] += delivery.upload_bytes
            answer = delivery.answer
            if isinstance(answer, Reply):
                answer = replayed_by(self.algorithm, self.run.state, self.round, answer)
            began = task.download["params"] if self.mixes_models else {}
            self.flights[task.client] = Flight(self.run.number, lands[task.client], answer, began)


def advance_buffered(
    run: BufferedRun[State],
    algorithm: Algorithm[State],
    engine: Engine,
    *,
    mode: Buffered,
    durations: Durations,
    population: Mapping[ClientId, Profile],
    sampler: Sampler,
    min_replies: int = 0,
    max_update_norm: float,
    metrics: MetricTable = METRICS,
    say: Callable[[str], None] | None = None,
) -> tuple[BufferedRun[State], Metrics, Sequence[ClientFailure]]:
    """Let clients train until `mode.size` of them answered, and take the server's step.

    Where nobody is left who could answer, the step is taken on fewer. What is said of rounds in `advance` holds of steps.

    Args:
        run: Before the step.
        algorithm: One whose uploads may be added up when they arrive, see `recipe_settings`.
        engine: Where clients run; its own time counts for nothing.
        mode: Answers of a step, and what an old one counts.
        durations: How long clients train.
        population: Who may.
        sampler: Who does, and how many at once.
        min_replies: As in `advance`, like the others.
        max_update_norm: Of one client and of the model.
        metrics: What clients may report.
        say: Told why a step is not kept.
    """
    round = draw(run, population, sampler)
    places = sampler.largest(len(population))
    assert places is not None, "samplers of independent draws are refused"
    timeline = Timeline(
        round,
        run.seconds,
        {client: flight.lands for client, flight in run.flights.items()},
        places,
        lambda seed: sampler.draw(population, seed),
        lambda c: durations.of(c, population[c], round_seed=round.seed),
    )
    trainings = _Trainings(run, algorithm, engine, round, mode.mixes == "models", dict(run.flights))
    began: dict[ClientId, float] = {}
    flights = trainings.flights

    def train() -> None:
        new = timeline.started[len(began) :]
        landing = {c: timeline.lands.get(c, timeline.now) for c in new}
        began.update(landing)
        trainings.train(landing)

    def age(client: ClientId) -> int:
        begun_now = client in timeline.started
        return 0 if begun_now else run.number - flights[client].began

    def counts(client: ClientId) -> bool:
        trained = client not in timeline.started or client in began
        lost = trained and isinstance(flights[client].answer, ClientFailure)
        return mode.takes(age(client)) and not lost

    num_counted = 0
    while num_counted < mode.size and timeline.next() is not None:
        num_counted = sum(map(counts, timeline.landed))
        if num_counted == mode.size:
            train()
            num_counted = sum(map(counts, timeline.landed))
    train()
    answered = [client for client in timeline.landed if mode.takes(age(client))]
    ages = {client: age(client) for client in answered}
    step = replace(round, cohort=tuple(sorted(answered)))
    now = algorithm.broadcast(run.state, step) if mode.mixes == "models" else {}

    def aged(reply: Reply) -> Reply:
        client = reply.client
        delta = mode.aged(
            reply.upload["delta"],
            ages[client],
            began=flights[client].sent,
            now=now[client]["params"] if client in now else {},
        )
        return replace(reply, upload={**reply.upload, "delta": delta})

    after, line, failures = take_up(
        run,
        algorithm,
        step,
        [Delivery(flights[client].answer) for client in answered],
        shaped=aged,
        min_replies=min_replies,
        max_update_norm=max_update_norm,
        metrics=metrics,
        say=say,
    )
    replied = [ages[c] for c in answered if isinstance(flights[c].answer, Reply)]
    told = {
        **line,
        **{f"comm/{way}_bytes": float(count) for way, count in trainings.bytes.items()},
        "comm/num_stale": float(len(timeline.landed) - len(answered)),
        "comm/num_training": float(len(timeline.lands)),
        "time/virtual_seconds": timeline.now - run.seconds,
    }
    if replied:
        told["server/staleness"] = sum(replied) / len(replied)
        told["server/max_staleness"] = float(max(replied))
        told["server/num_versions"] = float(len(set(replied)))
    left = {client: flights[client] for client in sorted(timeline.lands)}
    return replace(after, seconds=timeline.now, flights=left), told, failures
