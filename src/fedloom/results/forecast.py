"""How long a run takes and how much memory it needs: what its rounds ask of its clients, times what that costs here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product, zip_longest

from fedloom.client.local_settings import LocalSettings
from fedloom.client.setup import batches
from fedloom.core.protocols import ClientId, Fit, Split, Task, Work
from fedloom.core.randomness import derive
from fedloom.core.rehearsal import client_half, stand_in
from fedloom.data.federation import Shard
from fedloom.objectives.forward import Forward
from fedloom.results.probes import Line, Probes, tokens_of
from fedloom.rounds.loop import begin, draw, tasks
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session
from fedloom.spaces.seed_space import SeedSpace
from fedloom.tracking.environment import peak_memory_bytes


@dataclass(frozen=True)
class Forecast:
    """Of a whole run."""

    cohort: int
    """Clients of a round."""
    train_seconds: float
    """Of the clients alone: without messages and the server's own work."""
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


@dataclass(frozen=True)
class Measured:
    """What an evaluation measures of one split."""

    tokens: int
    """Of all rows whose loss is measured."""
    prompts: int
    """Tokens before the answers that are generated."""
    answers: Sequence[int]
    """How long those may be expected to be."""


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
    probes = Probes(session, shards, len(sent))
    fits = [work for some in works.values() for work in some if isinstance(work, Fit)]
    trained, memory = 0.0, 0.0
    if fits:
        cost = probes.training(fits[0])
        asked = _asked(session, sent, works, probes.lanes)
        trained = cost.piece * asked.pieces + cost.seconds.at(asked.tokens, asked.steps)
        memory = cost.memory.at(asked.largest) + _held_by_round(session, len(sent))
    judged, most = _judged(session, probes)
    # The weights after a round are rebuilt by whoever asks first: those who measure, or else who trains next.
    rebuilt = _rebuilt(session, fits)
    measured = sum(rebuilt[number] for number in _due(recipe)) if probes.judged else 0.0
    return Forecast(
        len(sent),
        trained * recipe.run.rounds + sum(rebuilt) - measured,
        judged + measured,
        int(max(memory, most, peak_memory_bytes())),
    )


def _due(recipe: Recipe) -> list[int]:
    """Return the rounds after which the model is measured, 0 before the first."""
    return [n for n in range(recipe.run.rounds + 1) if recipe.measures_after(n)]


def _rebuilt(session: Session, fits: Sequence[Fit]) -> list[float]:
    """Return the seconds in which weights are rebuilt after each round from 0, along all seeds drawn by then."""
    rounds = session.recipe.run.rounds
    if not isinstance(session.space, SeedSpace):
        return [0.0] * (rounds + 1)
    whole, pool = session.space.rebuild_seconds(), session.space.num_seeds
    drawn = sum(len(t) for fit in fits for t in (fit.seed_sequence or {}).values())
    return [whole * (1 - (1 - 1 / pool) ** (number * drawn)) for number in range(rounds + 1)]


def _judged(session: Session, probes: Probes) -> tuple[float, float]:
    """Return the seconds of all evaluations, and the most bytes of one."""
    if not probes.judged:
        return 0.0, 0.0
    evaluations = list(_evaluations(session))
    cost = probes.judging()
    seconds = sum(cost.seconds.at(each.tokens) for each in evaluations)
    memory = cost.memory.at(_largest(session, probes))
    at_once = max(len(each.answers) for each in evaluations)
    if at_once:
        token = probes.writing(min(session.recipe.evaluation.batch_size, at_once))
        for each in evaluations:
            seconds += cost.seconds.at(each.prompts, 0)
            seconds += _written(each.answers, token.seconds, session)
        memory = max(memory, token.memory.constant)
    return seconds, memory


def _held_by_round(session: Session, cohort: int) -> int:
    """Return the bytes of what a round keeps: of each client trained at once and of the server, params three times.

    They are what came of training, its difference and its message; the state, its next and its checkpoint.
    """
    size = sum(t.nbytes for t in session.space.start().values())
    return 3 * size * (1 + min(cohort, session.trainer.width))


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
    """Return the steps of a round, whose batches are those that it will draw; clients of a group take turns side by side."""
    pieces = steps = tokens = largest = 0
    for at in range(0, len(sent), lanes):
        group = [
            [
                _batch_tokens(session, task, turn, work)
                for turn, work in enumerate(works[task.client])
                if isinstance(work, Fit)
            ]
            for task in sent[at : at + lanes]
        ]
        for turn in zip_longest(*group, fillvalue=()):
            taken = [client for client in turn if client]
            pieces += len(taken)
            steps += max(map(len, taken), default=0)
            tokens += sum(sum(map(sum, client)) for client in taken)
            largest = max(largest, sum(max(map(max, client)) for client in taken))
    return Asked(pieces, steps, tokens, largest)


def _batch_tokens(session: Session, task: Task, turn: int, work: Fit) -> list[list[int]]:
    """Return the tokens of each batch of each step of a piece of training."""
    local, rows = session.recipe.local, session.federation.shards[task.client].train
    steps = batches(rows, local.batch_size * local.accumulation, derive(task.seed, turn))
    size = local.batch_size
    return [
        [tokens_of(step[i : i + size]) for i in range(0, len(step), size)]
        for step in islice(steps, _num_steps(work, local, len(rows)))
    ]


def _evaluations(session: Session) -> Iterator[Measured]:
    """Yield what is measured of each split in a run."""
    recipe, shards, evaluator = session.recipe, session.federation.shards, session.evaluator
    splits: tuple[Split, ...] = (
        ("validation", "test") if recipe.evaluation.validation else ("test",)
    )
    longest = recipe.evaluation.max_new_tokens
    for number, split in product(_due(recipe), splits):
        held = (shards[c] for c in session.drawn_judges(number, split))
        rows = [
            row
            for shard in held
            for row in evaluator.drawn(shard.test if split == "test" else shard.validation)
        ]
        written = split == "test" and recipe.evaluation.generate and not recipe.objective.classes
        asked = rows if written else []
        yield Measured(
            tokens_of(rows),
            sum(row.prompt_length for row in asked),
            # Before training a model goes on; then it learns when to stop.
            [longest if number == 0 else min(longest, 1 + row.num_targets) for row in asked],
        )


def _written(answers: Sequence[int], token: Line, session: Session) -> float:
    """Return the seconds of answers by their lengths, of which a batch is as long as its longest."""
    size = session.recipe.evaluation.batch_size
    together = [answers[at : at + size] for at in range(0, len(answers), size)]
    return token.at(sum(answers), sum(map(max, together)))


def _largest(session: Session, probes: Probes) -> int:
    """Return the tokens of the largest batch that is measured."""
    longest = max(row.num_tokens for row in probes.held)
    rows = Forward.of(session.space.model).most_rows(longest)
    return longest * min(len(probes.held), session.recipe.evaluation.batch_size, rows)


def _num_steps(work: Fit, local: LocalSettings, num_rows: int) -> int:
    if work.seed_sequence is None:
        return local.num_steps(num_rows, work.steps)
    return len(next(iter(work.seed_sequence.values()))) // local.directions
