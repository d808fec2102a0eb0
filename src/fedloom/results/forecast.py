"""How long a run takes and how much memory it needs: what its rounds ask of its clients, times what that costs here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from fedloom.client.setup import batches
from fedloom.core.protocols import ClientId, Fit, Split, Task, Work
from fedloom.core.randomness import derive
from fedloom.core.rehearsal import client_half, stand_in
from fedloom.data.federation import Shard
from fedloom.data.tokens import Example
from fedloom.results.probes import Probes
from fedloom.rounds.loop import begin, draw, tasks
from fedloom.rounds.session import Session
from fedloom.tracking.environment import peak_memory_bytes


@dataclass(frozen=True)
class Forecast:
    """Of a whole run."""

    train_seconds: float
    evaluate_seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Asked:
    """What a round asks of its clients."""

    pieces: int
    """Of training."""
    steps: int
    """Of all groups of clients that are trained at once."""
    tokens: int
    """Of all steps of all clients."""
    largest: int
    """Tokens of the largest batch."""


def forecast(session: Session, shards: dict[ClientId, Shard]) -> Forecast:
    """Return what the recipe's rounds and evaluations take.

    Args:
        session: The recipe, built.
        shards: The data that its trainer reads; probes are put among them.
    """
    recipe = session.recipe
    run = begin(recipe.algorithm, session.space.start(), recipe.run.seed)
    round = draw(run, session.learners, recipe.cohort)
    sent = tasks("train", round, recipe.algorithm.broadcast(run.state, round))
    works = {task.client: list(_works(session, task)) for task in sent}
    probes = Probes(session, shards)
    fits = [work for some in works.values() for work in some if isinstance(work, Fit)]
    trained, memory = 0.0, 0.0
    if fits:
        cost = probes.training(fits[0])
        asked = _asked(session, sent, works, probes.lanes)
        trained = cost.piece * asked.pieces + cost.seconds.at(asked.tokens, asked.steps)
        memory = cost.memory.at(asked.largest)
    judged = 0.0
    if probes.judged:
        cost = probes.judging()
        judged = sum(cost.seconds.at(tokens) for tokens in _evaluations(session))
        memory = max(memory, cost.memory.at(_largest(session)))
    return Forecast(trained * recipe.run.rounds, judged, int(max(memory, peak_memory_bytes())))


def _works(session: Session, task: Task) -> Iterator[Work]:
    """Yield what a client's half asks for, played through on no model."""
    half = client_half(session.recipe.algorithm, task, {})
    try:
        work = next(half)
        while True:
            yield work
            work = half.send(stand_in(work, task.seed, noise=1e-3))
    except StopIteration:
        return


def _asked(
    session: Session,
    sent: Sequence[Task],
    works: Mapping[ClientId, Sequence[Work]],
    lanes: int,
) -> Asked:
    """Return the steps of a round, whose batches are those that it will draw."""
    local, shards = session.recipe.local, session.federation.shards
    pieces = steps = tokens = largest = 0
    for at in range(0, len(sent), lanes):
        group = sent[at : at + lanes]
        counts, widest = [0], 0
        for task in group:
            rows = shards[task.client].train
            for turn, work in enumerate(works[task.client]):
                if not isinstance(work, Fit):
                    continue
                count = _num_steps(work, local.num_steps(len(rows), work.steps))
                drawn = batches(
                    rows, local.batch_size * local.accumulation, derive(task.seed, turn)
                )
                sizes = [
                    [
                        _tokens(step[i : i + local.batch_size])
                        for i in range(0, len(step), local.batch_size)
                    ]
                    for step in islice(drawn, count)
                ]
                pieces += 1
                counts.append(count)
                tokens += sum(map(sum, sizes))
                widest += max((max(each) for each in sizes), default=0)
        steps += max(counts) if lanes > 1 else sum(counts)
        largest = max(largest, widest)
    return Asked(pieces, steps, tokens, largest)


def _evaluations(session: Session) -> Iterator[int]:
    """Yield the tokens of each split that is measured in a run."""
    recipe, shards = session.recipe, session.federation.shards
    most, every = recipe.evaluation.max_examples, recipe.evaluation.every
    rounds = recipe.run.rounds
    due = {0, rounds, *(range(every, rounds, every) if every else ())}
    splits: tuple[Split, ...] = (
        ("validation", "test") if recipe.evaluation.validation else ("test",)
    )
    for number in sorted(due):
        for split in splits:
            total = 0
            for client in session.drawn_judges(number, split):
                shard = shards[client]
                rows = shard.test if split == "test" else shard.validation
                share = 1.0 if most is None else min(1.0, most / len(rows))
                total += int(share * _tokens(rows))
            if total:
                yield total


def _largest(session: Session) -> int:
    """Return the tokens of the largest batch that is measured."""
    held = [r for s in session.federation.shards.values() for r in (*s.validation, *s.test)]
    longest = max(len(row.ids) for row in held)
    return longest * min(len(held), session.recipe.evaluation.batch_size)


def _num_steps(work: Fit, otherwise: int) -> int:
    if work.seed_sequence is None:
        return otherwise
    return len(next(iter(work.seed_sequence.values())))


def _tokens(rows: Sequence[Example]) -> int:
    return sum(len(row.ids) for row in rows)
