"""Buffered rounds over sites: the server steps on the answers that are there first, in the order in which they really came.

Weights, buffers and who begins when are those of `rounds.buffered`; where answers come in the order of an event clock, the model is
that of the simulation, to the bit. What a site has not answered is no part of a checkpoint, which tells who trained and from which
step on: a server that goes on asks anew, from the model of then.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fedloom.core.description import describe, replayed_by
from fedloom.core.protocols import (
    Algorithm,
    Arriving,
    ClientFailure,
    ClientId,
    Engine,
    Metrics,
    Profile,
    Reply,
    State,
)
from fedloom.rounds.buffered import BufferedRun, Flight, Step, Timeline, advance_buffered
from fedloom.rounds.clock import Durations
from fedloom.rounds.loop import draw
from fedloom.server.buffering import Buffered
from fedloom.server.samplers import Sampler

_UNDER_WAY = "it was in training when the server ended, and is asked anew"


@dataclass(kw_only=True)
class _Awaited(Timeline):
    """Who trains is known to the engine."""

    engine: Arriving

    @property
    def training(self) -> Collection[ClientId]:
        return self.engine.training


@dataclass(kw_only=True)
class _Step(Step):
    """A step on what arrives."""

    engine: Arriving

    def gather(self) -> list[ClientId]:
        """Return who answers in this step; where sites were gone it waits for them, and asks them again."""
        while True:
            answered = super().gather()
            lost = {c for c in answered if isinstance(self.flights[c].answer, ClientFailure)}
            if not self.engine.too_few(len(answered) - len(lost)):
                return answered
            for client in lost:
                self.timeline.landed.remove(client)

    def next(self) -> ClientId | None:
        if new := self.timeline.fill():
            self._ask(new)
        if not self.engine.training:
            return None
        delivery = self.engine.arrival()
        client = delivery.answer.client
        self.download_bytes += delivery.download_bytes
        self.upload_bytes += delivery.upload_bytes
        self.flights[client] = replace(self.flights[client], answer=delivery.answer)
        self.trained.add(client)
        self.timeline.landed.append(client)
        return client

    def train(self) -> None:
        """Do nothing: whoever began is at it."""

    def _ask(self, new: Sequence[ClientId]) -> None:
        """Send clients their tasks."""
        round, asked = self.asked(new)
        state, replays = self.run.state, describe(self.algorithm).replays
        self.engine.begin(
            asked,
            partial(replayed_by, self.algorithm, state, round) if replays else _as_it_is,
        )
        for task in asked:
            under_way = ClientFailure(task.client, _UNDER_WAY)
            self.flights[task.client] = Flight(self.run.number, 0.0, under_way, self.sent(task))


def step_on(
    run: BufferedRun[State],
    algorithm: Algorithm[State],
    engine: Engine,
    *,
    durations: Durations,
    **terms: Any,
) -> tuple[BufferedRun[State], Metrics, Sequence[ClientFailure]]:
    """Take one step of the server: on what arrives where the engine's clients have a time of their own, else by the event clock.

    Args:
        run: Before the step.
        algorithm: As in `advance_buffered`.
        engine: Where clients run.
        durations: Of the event clock.
        **terms: The others of `advance_buffered`.
    """
    if isinstance(engine, Arriving):
        return advance_arriving(run, algorithm, engine, **terms)
    return advance_buffered(run, algorithm, engine, durations=durations, **terms)


def advance_arriving(
    run: BufferedRun[State],
    algorithm: Algorithm[State],
    engine: Arriving,
    *,
    mode: Buffered,
    population: Mapping[ClientId, Profile],
    sampler: Sampler,
    **terms: Any,
) -> tuple[BufferedRun[State], Metrics, Sequence[ClientFailure]]:
    """Wait until `mode.size` clients answered, and take the server's step; the arguments are those of `advance_buffered`.

    Where nobody is left who could answer, the step is taken on fewer. A client that is lost is a failure of the step, and
    leaves its place to another.
    """
    places = sampler.largest(len(population))
    assert places is not None, "samplers of independent draws are refused"
    timeline = _Awaited(
        draw(run, population, sampler),
        places,
        lambda seed: sampler.draw(population, seed),
        engine=engine,
    )
    # Of a run that goes on, nobody trains any more.
    under_way = {c: flight for c, flight in run.flights.items() if c in engine.training}
    step = _Step(run, algorithm, mode, timeline, under_way, engine=engine)
    return step.taken(**terms)


def _as_it_is(reply: Reply) -> Reply:
    return reply
