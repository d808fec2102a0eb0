"""Rounds in which nobody waits: the server steps on the first answers that are there, see `server.buffering`.

In a simulation an event clock says who answers when. It looks at recipe and seed only, so that the clients that begin before
one step of the server can train together, in one batch, though they begin one after another; what came of it lies in the
run, and in its checkpoint, until its time has come. A state that clients keep is written when its training is computed.
"""

from collections.abc import Callable, Mapping, Sequence
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
class _Step:
    """What happens before one step of the server: who begins, trains, answers, and what an answer counts."""

    run: BufferedRun[Any]
    algorithm: Algorithm[Any]
    engine: Engine
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
        while counted < self.mode.size and self.timeline.next() is not None:
            counted = sum(map(self._counts, landed))
            if counted == self.mode.size:
                # Those who turn out to be lost leave room for others.
                self._train()
                counted = sum(map(self._counts, landed))
        self._train()
        return [client for client in landed if self.mode.takes(self.age(client))]

    def age(self, client: ClientId) -> int:
        """Return the steps that the server took since a client was sent the model."""
        new = client in self.timeline.started
        return 0 if new else self.run.number - self.flights[client].began

    def _counts(self, client: ClientId) -> bool:
        known = client not in self.timeline.started or client in self.trained
        lost = known and isinstance(self.flights[client].answer, ClientFailure)
        return self.mode.takes(self.age(client)) and not lost

    def _train(self) -> None:
        """Let clients that began since the last time train, together."""
        timeline, run = self.timeline, self.run
        new = [client for client in timeline.started if client not in self.trained]
        if not new:
            return
        self.trained |= set(new)
        round = replace(timeline.round, cohort=tuple(sorted(new)))
        asked = tasks("train", round, self.algorithm.broadcast(run.state, round))
        for task, delivery in zip(asked, self.engine.run(asked), strict=True):
            self.download_bytes += delivery.download_bytes
            self.upload_bytes += delivery.upload_bytes
            answer = delivery.answer
            if isinstance(answer, Reply):
                answer = replayed_by(self.algorithm, run.state, round, answer)
            began = task.download["params"] if self.mode.mixes == "models" else {}
            lands = timeline.lands.get(task.client, timeline.now)
            self.flights[task.client] = Flight(run.number, lands, answer, began)

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
            "comm/num_training": float(len(timeline.lands)),
            "time/virtual_seconds": timeline.now - self.run.seconds,
        }
        ages = [self.age(c) for c in answered if isinstance(self.flights[c].answer, Reply)]
        if ages:
            told["server/staleness"] = sum(ages) / len(ages)
            told["server/max_staleness"] = float(max(ages))
            told["server/num_versions"] = float(len(set(ages)))
        return told


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
    timeline = Timeline(
        round,
        run.seconds,
        {client: flight.lands for client, flight in run.flights.items()},
        places,
        lambda seed: sampler.draw(population, seed),
        lambda c: durations.of(c, population[c], round_seed=round.seed),
    )
    step = _Step(run, algorithm, engine, mode, timeline, dict(run.flights))
    answered = step.gather()
    taken = replace(round, cohort=tuple(sorted(answered)))
    answers = [Delivery(step.flights[client].answer) for client in answered]
    after, line, failures = take_up(
        run, algorithm, taken, answers, shaped=step.shaped(taken), **terms
    )
    left = {client: step.flights[client] for client in sorted(timeline.lands)}
    told = {**line, **step.metrics(answered)}
    return replace(after, seconds=timeline.now, flights=left), told, failures
