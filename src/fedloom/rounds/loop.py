"""The round, once, for every algorithm and every engine."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar

from fedloom.core.description import describe
from fedloom.core.metrics import METRICS, MetricTable, Reduction, has_diverged
from fedloom.core.payloads import NoReplies
from fedloom.core.protocols import (
    Algorithm,
    ClientFailure,
    ClientId,
    Delivery,
    Engine,
    Metrics,
    Payload,
    Profile,
    Reply,
    Round,
    State,
    Task,
)
from fedloom.core.randomness import derive
from fedloom.core.together import groups_of
from fedloom.rounds.plausibility import Plausibility
from fedloom.rounds.state_checks import state_fault
from fedloom.server.samplers import Sampler


@dataclass(frozen=True)
class Run(Generic[State]):
    """Everything needed to go on after `number` rounds."""

    number: int
    seed: int
    state: State


R = TypeVar("R", bound=Run[Any])


@dataclass
class RoundTally:
    """What a round's deliveries cost and reported, added up while they stream by."""

    download_bytes: int = 0
    upload_bytes: int = 0
    num_replies: int = 0
    num_cut: int | None = None
    """Entries that clients cut to the clip of a secure sum; None where there was no such sum."""
    failures: list[ClientFailure] = field(default_factory=list)
    plausibility: Plausibility | None = None
    """Holds every reply against what its client declared; None takes all as they are."""
    reported: Reduction = field(default_factory=Reduction)
    """What clients report of themselves."""

    def replies(self, deliveries: Iterable[Delivery]) -> Iterator[Reply]:
        """Yield the replies; note bytes, failures and what clients report."""
        for delivery in deliveries:
            self.download_bytes += delivery.download_bytes
            self.upload_bytes += delivery.upload_bytes
            answer = delivery.answer
            if self.plausibility and isinstance(answer, Reply):
                answer = self.plausibility.of(answer)
            if isinstance(answer, ClientFailure):
                self.failures.append(answer)
                continue
            self.num_replies += answer.count
            if answer.count > 1:
                self.num_cut = (self.num_cut or 0) + delivery.num_cut
            self.reported.add(answer.metrics)
            yield answer

    def metrics(self) -> Metrics:
        """Return `train/*` (reduced as the metric table says) and `comm/*` (bytes of encoded messages)."""
        cut = {} if self.num_cut is None else {"comm/entries_cut": float(self.num_cut)}
        return {f"train/{name}": value for name, value in self.reported.result().items()} | {
            **cut,
            "comm/download_bytes": float(self.download_bytes),
            "comm/upload_bytes": float(self.upload_bytes),
            "comm/num_replies": float(self.num_replies),
            "comm/num_absent": float(len(self.failures)),
        }


def begin(algorithm: Algorithm[State], start: Any, seed: int) -> Run[State]:
    """Return the run before its first round; `start` is the space's starting point."""
    return Run(0, seed, algorithm.init(start, derive(seed, "init")))


def advance(
    run: Run[State],
    algorithm: Algorithm[State],
    engine: Engine,
    *,
    population: Mapping[ClientId, Profile],
    sampler: Sampler,
    min_replies: int = 0,
    max_update_norm: float = math.inf,
    metrics: MetricTable = METRICS,
    say: Callable[[str], None] | None = None,
) -> tuple[Run[State], Metrics, Sequence[ClientFailure]]:
    """Run one round.

    With fewer than `min_replies` replies, with too few for the algorithm, or where the new state is not finite or a model
    moved farther than `max_update_norm`, the round is spent and the state stays as it was: server halves are pure, so the
    new one is simply not kept. `say` is told why. What clients report is reduced as `metrics` says.
    """
    round = draw(run, population, sampler)
    sent = algorithm.broadcast(run.state, round)
    groups = groups_of(algorithm, run.state, round)
    deliveries = engine.run(tasks("train", round, sent, groups=groups))
    return take_up(
        run,
        algorithm,
        round,
        deliveries,
        min_replies=min_replies,
        max_update_norm=max_update_norm,
        metrics=metrics,
        say=say,
    )


def take_up(
    run: R,
    algorithm: Algorithm[Any],
    round: Round,
    deliveries: Iterable[Delivery],
    *,
    shaped: Callable[[Reply], Reply] = lambda reply: reply,
    min_replies: int = 0,
    max_update_norm: float = math.inf,
    metrics: MetricTable = METRICS,
    say: Callable[[str], None] | None = None,
) -> tuple[R, Metrics, Sequence[ClientFailure]]:
    """Take the server's step on what clients answered, see `advance`.

    Args:
        run: Before the step.
        algorithm: Whose step it is.
        round: The step's.
        deliveries: What became of its tasks, in the order in which replies are reduced.
        shaped: Makes of a reply that is believed what is aggregated.
        min_replies: As in `advance`, like the others.
        max_update_norm: Of one client and of the model.
        metrics: What clients may report.
        say: Told why a step is not kept.
    """
    bounds_updates = describe(algorithm).bounds_updates
    most = math.inf if bounds_updates else max_update_norm
    # A rule that compares uploads is to see all that it counts on.
    believed = bounds_updates or algorithm.server_sees == "each in full"
    plausibility = Plausibility(round.population, None if believed else max_update_norm)
    tally = RoundTally(plausibility=plausibility, reported=Reduction(metrics))
    state, server, is_updated, why = run.state, dict[str, float](), False, ""
    try:
        replies = map(shaped, tally.replies(deliveries))
        updated, reported = algorithm.server_update(run.state, round, replies)
        flaw = state_fault(run.state, updated, most=most)
        if flaw:
            why = (
                f"{flaw}; most of it came from {', '.join(plausibility.suspects()[:5]) or 'nobody'}"
            )
        elif tally.num_replies < min_replies:
            why = f"{tally.num_replies} clients replied, run.min_replies is {min_replies}"
        else:
            is_updated, state = True, updated
            server = {f"server/{name}": value for name, value in reported.items()}
    except NoReplies as error:
        why = str(error)
    if why and say:
        say(f"the model stays as it was: {why}")
    line = {**tally.metrics(), **server, "comm/round_kept": float(is_updated)}
    return replace(run, number=round.number, state=state), line, tally.failures


def measure(
    run: Run[State],
    algorithm: Algorithm[State],
    engine: Engine,
    *,
    kind: Literal["validate", "test"],
    population: Mapping[ClientId, Profile],
    clients: Sequence[ClientId],
) -> tuple[Mapping[ClientId, Metrics], Sequence[ClientFailure]]:
    """Measure what each of `clients` would use now.

    A client whose loss alone is not finite is a failure, so that it takes the others' means with it no more than one
    that is gone; where all say so, the model has diverged.
    """
    round = draw(run, population, None)
    sent = algorithm.broadcast(run.state, round)
    tally = RoundTally()
    replies = tally.replies(engine.run(tasks(kind, round, {c: sent[c] for c in clients})))
    measured = {reply.client: reply.metrics for reply in replies}
    lost = {client for client, metrics in measured.items() if has_diverged(metrics)}
    if len(lost) == len(measured):
        return measured, tally.failures
    odd = [
        ClientFailure(client, "it measured a loss that is not finite") for client in sorted(lost)
    ]
    sound = {client: metrics for client, metrics in measured.items() if client not in lost}
    return sound, [*tally.failures, *odd]


def draw(run: Run[Any], population: Mapping[ClientId, Profile], sampler: Sampler | None) -> Round:
    """Return the next round; without a sampler everybody is in it."""
    number, ids = run.number + 1, tuple(population)
    seed = derive(run.seed, "round", number)
    if sampler is None:
        return Round(number, seed, population, ids, 1.0)
    cohort = tuple(sampler.draw(population, seed))
    return Round(number, seed, population, cohort, sampler.rate(len(ids)))


def tasks(
    kind: Literal["train", "validate", "test"],
    round: Round,
    downloads: Mapping[ClientId, Payload],
    *,
    groups: Mapping[ClientId, str] = MappingProxyType({}),
) -> list[Task]:
    """Return a task for everybody who is sent something.

    Args:
        kind: Of all of them.
        round: Whose.
        downloads: What each client is sent.
        groups: Whose uploads may be added up, by client; all in one where nobody is named.
    """
    number, seed, population = round.number, round.seed, round.population
    return [
        Task(kind, number, c, derive(seed, c), population[c], download, groups.get(c, ""))
        for c, download in downloads.items()
    ]
