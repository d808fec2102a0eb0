"""Rounds played through without a model: what they ask of clients, and the bytes of their messages.

Training is answered with what came of a probe's, where there was one: learnt values compress otherwise than noise, a later
round's otherwise than the first's, and a reply is longer by the metrics that it brings.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedloom.core.description import describe
from fedloom.core.emulation import Aligns
from fedloom.core.params import add, equal, params_map
from fedloom.core.payloads import NoReplies
from fedloom.core.protocols import (
    Algorithm,
    ClientId,
    Done,
    Evaluate,
    Fit,
    Losses,
    Params,
    Reply,
    Round,
    Split,
    Task,
    Work,
)
from fedloom.core.randomness import generator
from fedloom.core.rehearsal import client_half, stand_in
from fedloom.core.together import groups_of
from fedloom.engines.codec import MessageCodec
from fedloom.engines.sums import RUN, forecast, sums_of
from fedloom.rounds.loop import Run, begin, draw, tasks
from fedloom.rounds.session import Session
from fedloom.wire.format import encode_reply, encode_task

FEW = 50_000_000
"""Numbers of all messages up to which every client of every round is played."""
ROUNDS = 3
"""Played where there are more: what is special of a run's beginning, such as probes, is over by then."""


@dataclass(frozen=True)
class Trained:
    """What came of one client's training."""

    moves: Sequence[Params]
    """Differences that it made, from the start and from where that had led; none where it was not asked or is large."""
    done: Done
    """What the client answered."""


@dataclass(frozen=True)
class PlayedRound:
    """What a round asks of its clients, and its bytes."""

    sent: Sequence[Task]
    """Without downloads."""
    steps: Mapping[ClientId, Sequence[int]]
    """Optimizer steps of each piece of training of a client."""
    looks: Mapping[ClientId, Sequence[Split | None]]
    """Which of a client's rows are measured on the way to what is trained, each time; None: the training ones."""
    num_seeds: int
    """Coordinates along which all clients walk together; 0 outside seed space."""
    download_bytes: int
    """Of all clients together."""
    upload_bytes: int
    """Of all clients together."""
    seconds: float
    """Of one client's messages and of what the server makes of them."""


def first_fit(session: Session) -> Fit | None:
    """Return the first training that is asked of anybody, None where the first client has none to do."""
    algorithm, run = session.recipe.algorithm, _begun(session)
    round = draw(run, session.learners, session.asked)
    for task in tasks("train", round, algorithm.broadcast(run.state, round))[:1]:
        return next(iter(_played(session, task, None).fits), None)
    return None


def play(session: Session, trained: Trained | None) -> list[PlayedRound]:
    """Return all rounds, or the first few where messages are large: those after them are like the last.

    Messages that grow with the sum of factors are alike later.
    """
    recipe, run = session.recipe, _begun(session)
    size = sum(t.numel() for t in session.space.start().values())
    cohort = len(draw(run, session.learners, session.asked).cohort)
    each = size * cohort * recipe.run.rounds <= FEW
    grows = describe(recipe.algorithm).multiplies_factors
    found = list[PlayedRound]()
    run = _aligned(run, recipe.algorithm)
    for _ in range(recipe.run.rounds if each or grows else min(ROUNDS, recipe.run.rounds)):
        run, round = _next(session, run, trained, each=each)
        run = _aligned(run, recipe.algorithm)
        found.append(round)
        if not each and len(found) >= ROUNDS and _alike(*found[-2:]):
            break
    return found


def _aligned(run: Run[Any], algorithm: Algorithm[Any]) -> Run[Any]:
    """Return a run whose emulator was moved by a step that leads nowhere: factors that were learnt compress less than zeros."""
    if not isinstance(algorithm, Aligns):
        return run
    steps = algorithm.steps if run.number else algorithm.before
    source = generator(run.seed, "aligned", run.number)
    slope = params_map(
        lambda t: torch.randn(t.shape, generator=source), algorithm.factors(run.state)
    )
    return replace(run, state=algorithm.moved(run.state, slope)) if steps else run


def _alike(one: PlayedRound, other: PlayedRound) -> bool:
    """Return whether rounds send as much, within a percent."""
    before, after = (each.download_bytes + each.upload_bytes for each in (one, other))
    return abs(after - before) <= 0.01 * before


@dataclass(frozen=True)
class _Half:
    """A client's half of a round, played."""

    task: Task
    works: Sequence[Work]
    reply: Reply

    @property
    def fits(self) -> Sequence[Fit]:
        """Return what is trained."""
        return [work for work in self.works if isinstance(work, Fit)]

    @property
    def looks(self) -> Sequence[Split | None]:
        """Return what is measured, see `PlayedRound`."""
        measured = [work for work in self.works if isinstance(work, Evaluate | Losses)]
        return [work.split if isinstance(work, Evaluate) else None for work in measured]


def _next(
    session: Session, run: Run[Any], trained: Trained | None, *, each: bool
) -> tuple[Run[Any], PlayedRound]:
    """Play one more round; unless `each` client is played, one answers for all who are sent the same kind of thing."""
    began = time.perf_counter()
    algorithm, wire = session.recipe.algorithm, session.recipe.wire
    round = draw(run, session.learners, session.asked)
    downloads, groups = (
        algorithm.broadcast(run.state, round),
        groups_of(algorithm, run.state, round),
    )
    sent = tasks("train", round, downloads, groups=groups)
    played, halves = dict[str, _Half](), list[_Half]()
    for task in sent:
        kind = task.client if each else f"{_tier(round, task)} {_asked(task)}"
        if kind not in played:
            played[kind] = _played(session, task, trained)
        halves.append(played[kind])
    # Encoded by one side and decoded by the other, which takes about as long as making up what was learnt.
    down = {k: len(encode_task(half.task, settings=wire)) for k, half in played.items()}
    up = {k: len(encode_reply(half.reply, settings=wire)) for k, half in played.items()}
    sizes = {id(half): (down[kind], up[kind]) for kind, half in played.items()}
    to_all, from_all = _summed(session, sent)
    replies = [
        replace(half.reply, client=task.client) for task, half in zip(sent, halves, strict=True)
    ]
    try:
        state, _ = algorithm.server_update(run.state, round, replies)
    except NoReplies:
        # A Poisson cohort may be empty.
        state = run.state
    steps = {
        task.client: [_num_steps(session, task, work) for work in half.fits]
        for task, half in zip(sent, halves, strict=True)
    }
    return replace(run, number=run.number + 1, state=state), PlayedRound(
        [replace(task, download={}) for task in sent],
        steps,
        {task.client: half.looks for task, half in zip(sent, halves, strict=True)},
        sum(_num_seeds(work) for half in halves for work in half.fits),
        sum(sizes[id(half)][0] for half in halves) + to_all,
        from_all or sum(sizes[id(half)][1] for half in halves),
        (time.perf_counter() - began) / max(len(played), 1),
    )


def _summed(session: Session, sent: Sequence[Task]) -> tuple[int, int]:
    """Return the bytes of secure sums to all clients, beside their tasks, and from them; 0 where there are none."""
    recipe = session.recipe
    if recipe.secure is None or not sent:
        return 0, 0
    codec = MessageCodec(recipe.algorithm, recipe.wire, recipe.metrics)
    return forecast(sums_of(sent, codec.bodies(sent), codec, recipe.secure, RUN))


def _asked(task: Task) -> list[tuple[str, list[str]]]:
    """Return the names of all that a download holds, by which a client knows what it is to do."""
    return sorted((group, sorted(tensors)) for group, tensors in task.download.items())


def _tier(round: Round, task: Task) -> str:
    return str(round.population[task.client].get("tier", ""))


def _begun(session: Session) -> Run[Any]:
    return begin(session.recipe.algorithm, session.space.start(), session.recipe.run.seed)


def _played(session: Session, task: Task, trained: Trained | None) -> _Half:
    """Return a client's half, whose work is answered without a model."""
    half, works = client_half(session.recipe.algorithm, task, {}), list[Work]()
    start = session.space.start()
    try:
        work = next(half)
        while True:
            works.append(work)
            work = half.send(_answer(work, task, start, trained))
    except StopIteration as stop:
        return _Half(task, works, stop.value[0])


def _answer(work: Work, task: Task, start: Params, trained: Trained | None) -> Done:
    done = stand_in(work, task.seed, noise=1e-2)
    if trained is None or not isinstance(work, Fit):
        return done
    moves = trained.moves
    done = replace(done, lr_sum=trained.done.lr_sum, metrics=trained.done.metrics)
    # A smaller rank's tensors are narrower than the probe's.
    if not moves or _shapes(work.start) != _shapes(moves[0]):
        return done
    moved = moves[0] if equal(work.start, start) else moves[-1]
    return replace(done, params=add(work.start, moved))


def _shapes(params: Params) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in params.items()}


def _num_steps(session: Session, task: Task, work: Fit) -> int:
    local = session.recipe.local
    if work.seed_sequence is None:
        rows = session.federation.shards[task.client].train
        return local.num_steps(len(rows), work.steps)
    return len(next(iter(work.seed_sequence.values()))) // local.directions


def _num_seeds(work: Fit) -> int:
    return sum(len(sequence) for sequence in (work.seed_sequence or {}).values())
