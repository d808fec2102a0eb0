"""How long a run takes, how much memory it needs and what it sends: what its rounds ask, times what that costs here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Literal

from fedloom.client.setup import Step, batches
from fedloom.core.description import describe
from fedloom.core.protocols import ClientId, Fit, Split, Task
from fedloom.core.randomness import derive
from fedloom.data.federation import Shard
from fedloom.data.tokens import Example
from fedloom.evaluation.measure import distinct
from fedloom.results.played import PlayedRound, first_fit, play
from fedloom.results.probes import Cost, Line, Loads, Probes, aligning, padded
from fedloom.rounds.emulation import AlignmentStage
from fedloom.rounds.loop import begin, draw
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
    """Of the clients alone: without messages and the server's own work. What algorithms measure on the way is in it."""
    message_seconds: float
    """Of those."""
    evaluate_seconds: float
    align_seconds: float
    """Of the server, which aligns an emulator between rounds."""
    peak_memory_bytes: int
    activations: int
    """Bytes of memory that grow with the tokens of the largest batch."""
    held_by_round: int
    """Bytes of memory that a round keeps of params."""
    total_bytes: int
    """Of all messages."""
    rounds: Sequence[PlayedRound]
    """All of them, or the first few; those after them are like the last."""


@dataclass(frozen=True)
class Asked:
    """What a round asks of its clients."""

    pieces: int
    """Of training."""
    steps: int
    """Of all groups of clients that are trained at once."""
    tokens: int
    """Of all batches of all clients, padding included."""
    largest: int
    """Tokens of the largest batch."""


@dataclass
class Measured:
    """What one evaluation of one split measures."""

    calls: int = 0
    """Times that clients are measured together, which share their batches."""
    batches: list[int] = field(default_factory=list)
    """Tokens, padding included, of each batch whose loss is measured."""
    prompts: list[int] = field(default_factory=list)
    """Tokens, padding included, of each batch of prompts that are answered."""
    answers: list[Sequence[int]] = field(default_factory=list)
    """How long the answers to each of those may be expected to be."""


def forecast(
    session: Session, shards: dict[ClientId, Shard], stage: AlignmentStage | None = None
) -> Forecast:
    """Return what the recipe's rounds and evaluations take.

    Args:
        session: The recipe, built.
        shards: The data that its trainer reads; probes are put among them.
        stage: What the server does between rounds, if anything.
    """
    recipe = session.recipe
    begun = begin(recipe.algorithm, session.space.start(), recipe.run.seed)
    cohort = len(draw(begun, session.learners, session.asked).cohort)
    probes, fit = Probes(session, shards, cohort), first_fit(session)
    tuned = _tuned(session, probes)
    if fit is None and tuned:
        fit = Fit(session.space.start())
    cost = probes.training(fit) if fit else _NOTHING
    evaluations, judging = _evaluations(session, probes), probes.judging()
    judged, most = _judged(probes, judging, evaluations)
    judged += sum(cost.piece * one.pieces + cost.seconds.at(one.tokens, one.steps) for one in tuned)
    aligned, held = _aligned(stage)
    memory, loads = max(most, held, peak_memory_bytes()), probes.loads()
    # Made up only now, so that what that takes is not counted as the run's.
    rounds = play(session, probes.trained)
    asked = _asked_of(session, rounds, probes)
    rebuilt = _rebuilt(session, rounds, loads)
    trained = sum(cost.piece * one.pieces + cost.seconds.at(one.tokens, one.steps) for one in asked)
    looks = _looks(session, rounds, probes)
    trained += sum(judging.seconds.at(sum(one), len(one)) for one in looks)
    memory = max([memory, *(judging.memory.at(tokens) for one in looks for tokens in one)])
    # Whoever asks first for the weights after a round has them rebuilt: those who measure, or else who trains next.
    for number, seconds in rebuilt.items():
        calls = sum(one.calls for one in evaluations.get(number, ()))
        judged += seconds + loads.again * (calls - 1) if calls else 0.0
        trained += 0.0 if calls else seconds - loads.again
        trained += loads.again * asked[number].pieces if number < recipe.run.rounds else 0.0
    largest, held = max((one.largest for one in asked), default=0), held_by_round(session, cohort)
    if any(one.pieces for one in asked):
        memory = max(memory, cost.memory.at(largest) + held)
    around = sum(one.seconds for one in rounds) / len(rounds)
    sizes = [one.download_bytes + one.upload_bytes for one in rounds]
    return Forecast(
        cohort,
        trained,
        around * cohort * recipe.run.rounds,
        judged,
        aligned,
        int(memory),
        int(cost.memory.slope * largest),
        held,
        sum(sizes) + sizes[-1] * (recipe.run.rounds - len(rounds)),
        rounds,
    )


_NOTHING = Cost(0.0, Line(0.0, 0.0), Line(0.0, 0.0))


def _rebuilt(session: Session, rounds: Sequence[PlayedRound], loads: Loads) -> dict[int, float]:
    """Return the seconds in which weights are first brought to where each round has left them; nothing but in seed space."""
    space, total = session.space, session.recipe.run.rounds
    if not isinstance(space, SeedSpace):
        return {}
    whole, stays = space.rebuild_seconds(), 1 - 1 / space.num_seeds
    drawn, found = 0, dict[int, float]()
    for number in range(1, total + 1):
        latest = rounds[min(number, len(rounds)) - 1].num_seeds
        # Sums of integers go on from the last ones; others are taken anew, along all seeds drawn so far.
        drawn = latest if space.sums_go_on else drawn + latest
        found[number] = loads.first + whole * (1 - stays**drawn)
    return found


def _aligned(stage: AlignmentStage | None) -> tuple[float, float]:
    """Return the seconds of all steps that align an emulator, and the most bytes of one."""
    if stage is None:
        return 0.0, 0.0
    cost, sizes = aligning(stage), [padded(rows) for rows in stage.all_batches()]
    return cost.seconds.at(sum(sizes), len(sizes)), cost.memory.at(max(sizes))


def _looks(session: Session, rounds: Sequence[PlayedRound], probes: Probes) -> list[Sequence[int]]:
    """Return the tokens of each batch that an algorithm has measured on the way to what it trains, round by round."""
    total, known = session.recipe.run.rounds, [_looked(session, one, probes) for one in rounds]
    return [known[min(number, len(known) - 1)] for number in range(total)]


def _looked(session: Session, round: PlayedRound, probes: Probes) -> list[int]:
    shards, width, found = session.federation.shards, session.trainer.width, list[int]()
    for at in range(0, len(round.sent), width):
        group = [task.client for task in round.sent[at : at + width]]
        for turn in range(max(len(round.looks[client]) for client in group)):
            asked = [c for c in group if turn < len(round.looks[c])]
            own = [c for c in asked if round.looks[c][turn] is None]
            # Held-out rows are measured together on the model that all were sent; training rows are a client's own.
            held = {
                row.key: row
                for c in asked
                if c not in own
                for row in session.evaluator.drawn(shards[c].validation)
            }
            for rows in ([*held.values()], *(shards[c].train for c in own)):
                found += probes.judged_tokens(rows) if rows else []
    return found


def _judged(
    probes: Probes, cost: Cost, evaluations: Mapping[int, Sequence[Measured]]
) -> tuple[float, float]:
    """Return the seconds of all evaluations, without rebuilds of weights, and the most bytes of one."""
    every = [one for some in evaluations.values() for one in some if one.batches]
    if not every:
        return 0.0, 0.0
    seconds = sum(cost.seconds.at(sum(one.batches), len(one.batches)) for one in every)
    memory = cost.memory.at(max(tokens for one in every for tokens in (*one.batches, *one.prompts)))
    at_once = max((len(batch) for one in every for batch in one.answers), default=0)
    if at_once:
        token = probes.writing(at_once)
        for one in every:
            seconds += cost.seconds.at(sum(one.prompts), 0)
            seconds += sum(token.seconds.at(sum(batch), max(batch)) for batch in one.answers)
        memory = max(memory, token.memory.constant)
    return seconds, memory


def held_by_round(session: Session, cohort: int) -> int:
    """Return the bytes of what a round keeps: of each client trained at once and of the server, params three times.

    They are what came of training, its difference and its message; the state, its next and its checkpoint.
    """
    size = sum(t.nbytes for t in session.space.start().values())
    return 3 * size * (1 + min(cohort, session.trainer.width))


def _asked_of(session: Session, rounds: Sequence[PlayedRound], probes: Probes) -> list[Asked]:
    """Return what each round asks; the batches of another that asks for as many steps are alike."""
    known: dict[tuple[tuple[int, ...], ...], Asked] = {}
    found = []
    for number in range(session.recipe.run.rounds):
        round = rounds[min(number, len(rounds) - 1)]
        kind = tuple(sorted(tuple(steps) for steps in round.steps.values()))
        if kind not in known:
            known[kind] = _asked(session, round, probes)
        found.append(known[kind])
    return found


def _asked(session: Session, round: PlayedRound, probes: Probes) -> Asked:
    """Return the steps of a round, whose batches are those that it will draw; clients of a group take turns side by side."""
    pieces = steps = tokens = largest = 0
    for at in range(0, len(round.sent), probes.lanes):
        group = round.sent[at : at + probes.lanes]
        for turn in range(max(len(round.steps[task.client]) for task in group)):
            streams = [
                _steps(session, task, turn, round.steps[task.client][turn])
                for task in group
                if turn < len(round.steps[task.client])
            ]
            pieces += len(streams)
            for together in zip_longest(*streams):
                batches = probes.learnt_tokens([step for step in together if step])
                steps += 1
                tokens += sum(batches)
                largest = max(largest, *batches)
    return Asked(pieces, steps, tokens, largest)


def _steps(session: Session, task: Task, turn: int, num_steps: int) -> Iterator[Step]:
    """Yield the rows of each step of a piece of training."""
    local, rows = session.recipe.local, session.federation.shards[task.client].train
    stream = batches(rows, local.rows * local.accumulation, derive(task.seed, turn))
    return islice(stream, num_steps)


def _evaluations(session: Session, probes: Probes) -> dict[int, list[Measured]]:
    """Return what is measured after each round, 0 before the first, of each split."""
    recipe = session.recipe
    again = bool(recipe.evaluation.finetune.steps)
    splits: list[Judged] = ["validation"] if recipe.evaluation.validation else []
    splits += _tested(session)
    asked = [(split, False) for split in splits]
    # What was fine-tuned is a client's own.
    asked += [(split, True) for split in splits if again and split != "validation"]
    return {
        n: [_measured(session, probes, n, split, alone=alone) for split, alone in asked]
        for n in _due(recipe)
    }


Judged = Split | Literal["unseen"]


def _tested(session: Session) -> list[Judged]:
    return ["test", "unseen"] if session.unseen else ["test"]


def _due(recipe: Recipe) -> list[int]:
    return [n for n in range(recipe.run.rounds + 1) if recipe.measures_after(n)]


def _tuned(session: Session, probes: Probes) -> list[Asked]:
    """Return what clients train before they are measured a second time, by evaluation."""
    recipe, steps, found = session.recipe, session.recipe.evaluation.finetune.steps, list[Asked]()
    for number in _due(recipe) if steps else ():
        clients = [
            client
            for split in _tested(session)
            for client in session.drawn_judges(number, split)
            if session.counts[client].rows
        ]
        sent = [Task("test", number + 1, c, derive(recipe.run.seed, c), {}, {}) for c in clients]
        round = PlayedRound(sent, {c: [steps] for c in clients}, {}, 0, 0, 0, 0.0)
        found.append(_asked(session, round, probes))
    return found


def _measured(
    session: Session, probes: Probes, number: int, split: Judged, *, alone: bool = False
) -> Measured:
    """Return what is measured of a split after a round, where as many clients share a model as a trainer takes at once.

    Args:
        session: The recipe, built.
        probes: What a batch is.
        number: Of the round.
        split: Whose rows.
        alone: Whether every client is measured on a model of its own.
    """
    recipe, shards = session.recipe, session.federation.shards
    width = 1 if alone else session.trainer.width
    # A mixture is a client's own, and the losses of all its models are taken.
    models = describe(recipe.algorithm).components
    width = width if models == 1 else 1
    clients = session.drawn_judges(number, split)
    if alone:
        clients = [client for client in clients if session.counts[client].rows]
    found = Measured()
    written = split != "validation" and recipe.evaluation.generate and not recipe.objective.classes
    for at in range(0, len(clients), width):
        held = [shards[client] for client in clients[at : at + width]]
        rows = distinct(
            row
            for shard in held
            for row in session.evaluator.drawn(
                shard.validation if split == "validation" else shard.test
            )
        )
        found.calls += 1
        found.batches += probes.judged_tokens(rows) * models
        if written:
            for chosen in probes.answered(rows):
                found.prompts.append(len(chosen) * max(row.prompt_length for row in chosen))
                found.answers.append([_expected(recipe, number, row) for row in chosen])
    return found


def _expected(recipe: Recipe, number: int, row: Example) -> int:
    """Return how long an answer may be: before training a model goes on; then it learns when to stop."""
    longest = recipe.evaluation.max_new_tokens
    return longest if number == 0 else min(longest, 1 + row.num_targets)
