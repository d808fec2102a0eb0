"""Rounds in which nobody waits: the server steps on the first answers that are there, see `server.buffering`.

Here an event clock says who answers when, that of a simulation; `rounds.buffered_sites` has rounds over sites, whose clock is their own. It looks at recipe and seed only, so that the clients that begin before
one step of the server can train together, in one batch, though they begin one after another; what came of it lies in the
run, and in its checkpoint, until its time has come. A state that clients keep is written when its training is computed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from fedloom.core.description import replayed_by
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
    Task,
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
class Timeline(ABC):
    """Who begins and who answers before one step of the server, in order."""

    round: Round
    places: int
    """How many train at once."""
    cohort: Callable[[int], Sequence[ClientId]]
    """Draws the cohort of a seed."""
    landed: list[ClientId] = field(default_factory=list)
    """Who answered, in order."""
    started: list[ClientId] = field(default_factory=list)
    """Who began."""
    _draws: int = 0

    @property
    @abstractmethod
    def training(self) -> Collection[ClientId]:
        """Return who trains."""

    def fill(self) -> list[ClientId]:
        """Return clients of the next cohorts, who begin in all places that are free; who answered does not begin again."""
        training, new = {*self.training}, list[ClientId]()
        able = self.round.population.keys() - training - set(self.landed)
        while able and len(training) < self.places and self._draws < _DRAWS:
            seed = self.round.seed
            seed = derive(seed, "again", self._draws) if self._draws else seed
            self._draws += 1
            drawn = [client for client in self.cohort(seed) if client in able]
            free = self.places - len(training)
            # Cohorts are sorted by name, which is to favour nobody.
            if len(drawn) > free:
                drawn = sorted(drawn, key=lambda client: derive(seed, client))[:free]
            new += drawn
            training |= set(drawn)
            able -= set(drawn)
        self.started += new
        return new


@dataclass(kw_only=True)
class EventClock(Timeline):
    """The order of a simulation; nothing that clients learn changes it."""

    now: float
    lands: dict[ClientId, float]
    """When those who train answer."""
    duration: Callable[[ClientId], float]

    @property
    def training(self) -> Collection[ClientId]:
        return self.lands

    def next(self) -> ClientId | None:
        """Return who answers next; None where nobody trains and nobody can begin.

        All who answer at one instant do before anybody begins, and who answered begins again after the step alone.
        """
        if min(self.lands.values(), default=float("inf")) > self.now:
            self.lands |= {client: self.now + self.duration(client) for client in self.fill()}
        if not self.lands:
            return None
        client = min(self.lands, key=lambda client: (self.lands[client], client))
        self.now = max(self.now, self.lands.pop(client))
        self.landed.append(client)
        return client


@dataclass
class Step(ABC):
    """What happens before one step of the server: who begins, trains, answers, and what an answer counts."""

    run: BufferedRun[Any]
    algorithm: Algorithm[Any]
    mode: Buffered
    timeline: Timeline
    flights: dict[ClientId, Flight]
    """Those before, and those of this step once they are computed."""
    trained: set[ClientId] = field(default_factory=set)
    """Of those who began in this step."""
    download_bytes: int = 0
    upload_bytes: int = 0

    def gather(self) -> list[ClientId]:
        """Return who answers in this step and is not too old, in order; fewer than `size` where nobody is left."""
        counted, landed = 0, self.timeline.landed
        while counted < self.mode.size and self.next() is not None:
            counted = sum(map(self._counts, landed))
            if counted == self.mode.size:
                # Those who turn out to be lost leave room for others.
                self.train()
                counted = sum(map(self._counts, landed))
        self.train()
        return [client for client in landed if self.mode.takes(self.age(client))]

    def age(self, client: ClientId) -> int:
        """Return the steps that the server took since a client was sent the model."""
        new = client in self.timeline.started
        return 0 if new else self.run.number - self.flights[client].began

    def _counts(self, client: ClientId) -> bool:
        known = client not in self.timeline.started or client in self.trained
        lost = known and isinstance(self.flights[client].answer, ClientFailure)
        return self.mode.takes(self.age(client)) and not lost

    @abstractmethod
    def next(self) -> ClientId | None:
        """Return who answers next; None where nobody trains and nobody can begin."""

    @abstractmethod
    def train(self) -> None:
        """Let clients that began since the last time train, where they do not yet."""

    def asked(self, new: Sequence[ClientId]) -> tuple[Round, list[Task]]:
        """Return the round of clients that begin together, and their tasks."""
        round = replace(self.timeline.round, cohort=tuple(sorted(new)))
        return round, tasks("train", round, self.algorithm.broadcast(self.run.state, round))

    def sent(self, task: Task) -> Params:
        """Return what is kept of a task's download until its answer counts."""
        return task.download["params"] if self.mode.mixes == "models" else {}

    def shaped(self, round: Round) -> Callable[[Reply], Reply]:
        """Return what makes of a reply what it counts."""
        mixes = self.mode.mixes == "models"
        now = self.algorithm.broadcast(self.run.state, round) if mixes else {}

        def aged(reply: Reply) -> Reply:
            client = reply.client
            delta = self.mode.aged(
                reply.upload["delta"],
                self.age(client),
                began=self.flights[client].sent,
                now=now[client]["params"] if mixes else {},
            )
            return replace(reply, upload={**reply.upload, "delta": delta})

        return aged

    def metrics(self, answered: Sequence[ClientId]) -> Metrics:
        """Return what is told of bytes, time and staleness."""
        timeline = self.timeline
        told = {
            "comm/download_bytes": float(self.download_bytes),
            "comm/upload_bytes": float(self.upload_bytes),
            "comm/num_stale": float(len(timeline.landed) - len(answered)),
            "comm/num_training": float(len(timeline.training)),
        }
        ages = [self.age(c) for c in answered if isinstance(self.flights[c].answer, Reply)]
        if ages:
            told["server/staleness"] = sum(ages) / len(ages)
            told["server/max_staleness"] = float(max(ages))
            told["server/num_versions"] = float(len(set(ages)))
        return told

    def taken(self, **terms: Any) -> tuple[BufferedRun[Any], Metrics, Sequence[ClientFailure]]:
        """Gather answers and take the step, as `take_up` does; who trains still is left in the run."""
        answered = self.gather()
        round = replace(self.timeline.round, cohort=tuple(sorted(answered)))
        answers = [Delivery(self.flights[client].answer) for client in answered]
        after, line, failures = take_up(
            self.run, self.algorithm, round, answers, shaped=self.shaped(round), **terms
        )
        left = {client: self.flights[client] for client in sorted(self.timeline.training)}
        return replace(after, flights=left), {**line, **self.metrics(answered)}, failures


@dataclass(kw_only=True)
class _Simulated(Step):
    """A step of the event clock."""

    engine: Engine
    clock: EventClock

    def next(self) -> ClientId | None:
        return self.clock.next()

    def train(self) -> None:
        """Let them train together."""
        new = [client for client in self.clock.started if client not in self.trained]
        if not new:
            return
        self.trained |= set(new)
        round, asked = self.asked(new)
        for task, delivery in zip(asked, self.engine.run(asked), strict=True):
            self.download_bytes += delivery.download_bytes
            self.upload_bytes += delivery.upload_bytes
            answer = delivery.answer
            if isinstance(answer, Reply):
                answer = replayed_by(self.algorithm, self.run.state, round, answer)
            lands = self.clock.lands.get(task.client, self.clock.now)
            self.flights[task.client] = Flight(self.run.number, lands, answer, self.sent(task))


def advance_buffered(
    run: BufferedRun[State],
    algorithm: Algorithm[State],
    engine: Engine,
    *,
    mode: Buffered,
    durations: Durations,
    population: Mapping[ClientId, Profile],
    sampler: Sampler,
    **terms: Any,
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
        **terms: `min_replies`, `max_update_norm`, `metrics` and `say`, as in `advance`.
    """
    round, places = draw(run, population, sampler), sampler.largest(len(population))
    assert places is not None, "samplers of independent draws are refused"
    clock = EventClock(
        round,
        places,
        lambda seed: sampler.draw(population, seed),
        now=run.seconds,
        lands={client: flight.lands for client, flight in run.flights.items()},
        duration=lambda c: durations.of(c, population[c], round_seed=round.seed),
    )
    step = _Simulated(run, algorithm, mode, clock, dict(run.flights), engine=engine, clock=clock)
    after, line, failures = step.taken(**terms)
    line = {**line, "time/virtual_seconds": clock.now - run.seconds}
    return replace(after, seconds=clock.now), line, failures
