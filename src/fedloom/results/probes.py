"""What a step of training and an answer to be judged cost here: seconds and memory, from two sizes of each.

Nothing of a recipe's own size is run. Time and memory are lines in the number of tokens, and two points make a line.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fedloom.client.cohort import Cohort
from fedloom.client.fast.kernels import FastPath
from fedloom.client.make_trainer import GROUPS
from fedloom.client.setup import Step
from fedloom.client.trainer import OneByOne
from fedloom.core.params import params_map
from fedloom.core.params import sub as difference
from fedloom.core.protocols import ClientId, Done, Evaluate, Fit, Job, Params, Work
from fedloom.core.randomness import derive
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.data.federation import Shard
from fedloom.data.tokens import Example
from fedloom.evaluation import generation
from fedloom.evaluation.measure import PluggedIn, distinct
from fedloom.evaluation.scoring import batches, evaluating
from fedloom.models.generation import write_greedily
from fedloom.models.probe import keeps_padding_out
from fedloom.objectives.forward import Forward
from fedloom.results.played import FEW, Trained
from fedloom.rounds.emulation import AlignmentStage
from fedloom.rounds.session import Session
from fedloom.spaces.seed_space import SeedSpace
from fedloom.tracking.environment import peak_memory_bytes, phase_memory

TOKENS = 512
"""Of the larger probe: as many as fill a processor's products."""
MORE = 2
"""Steps by which a piece of training is longer than another, for the time of a step alone."""
MORE_TOKENS = 4
"""Of a longer answer."""
PROMPT = 16
"""Tokens of a prompt before answers that are timed."""
ENOUGH_SECONDS = 15.0
"""Measuring is not repeated where it would take longer."""
TURNS = 3
SMALL, LARGE = "probe small", "probe large"


@dataclass(frozen=True)
class Line:
    """A quantity that grows with a number of tokens."""

    constant: float
    slope: float

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float]) -> "Line":
        """Return the line through two (tokens, quantity); through the origin where noise leaves no other."""
        (x, y), (xx, yy) = small, large
        slope = (yy - y) / (xx - x) if xx > x else 0.0
        if slope <= 0 or yy < slope * xx:
            return cls(0.0, yy / xx)
        return cls(yy - slope * xx, slope)

    def at(self, tokens: float, parts: float = 1.0) -> float:
        """Return the quantity of `tokens` that come in so many parts."""
        return self.constant * parts + self.slope * tokens


@dataclass(frozen=True)
class Cost:
    """Of one kind of work."""

    piece: float
    """Seconds of a client's piece of work beside its steps."""
    seconds: Line
    """Of a step, or of a call."""
    memory: Line
    """Bytes of the process, by the tokens of a batch."""


@dataclass(frozen=True)
class Loads:
    """Seconds in which weights are brought to where coefficients say, without those of the directions."""

    first: float = 0.0
    """Where nobody has been before."""
    again: float = 0.0


class Probes:
    """Clients that only a forecast asks, with a few rows of the others."""

    def __init__(self, session: Session, shards: dict[ClientId, Shard], cohort: int) -> None:
        """Put them among the clients whose data the trainer reads.

        Args:
            session: The recipe, built.
            shards: The data that its trainer reads.
            cohort: Clients of a round.
        """
        trainer, local = session.trainer, session.recipe.local
        together = trainer.width // GROUPS if isinstance(trainer, Cohort) else 1
        self.lanes = max(1, min(together, cohort))
        """Clients whose steps the trainer takes at once."""
        known = list(shards.values())
        whole = local.rows * local.accumulation
        self._session = session
        self.trained: Trained | None = None
        """What came of training, once it was asked what that costs."""
        self._learnt = _two_sizes([row for shard in known for row in shard.train], whole)
        # Equal rows would be measured once.
        held = distinct(row for shard in known for row in (*shard.validation, *shard.test))
        self.held = held or distinct(row for shard in known for row in shard.train)
        """All rows that may be measured; where none are held out, those of whom the loss is asked in training."""
        # Clients that are measured together share their batches; of more rows of one, the evaluator would draw some.
        judging, judges = session.recipe.evaluation, len(session.judges)
        measured = min(trainer.width, judges, judging.clients or judges)
        size = session.evaluator.batch_size
        each = judging.max_examples or size
        self.judged = _two_sizes(self.held, min(size, max(1, each * measured)))
        self._judging: dict[str, list[ClientId]] = {}
        for name, rows in self._learnt.items():
            shards.update({n: Shard(rows, (), ()) for n in self._names(name, self.lanes)})
        for name, rows in self.judged.items():
            parts = [rows[at : at + each] for at in range(0, len(rows), each)]
            self._judging[name] = self._names(name, len(parts))
            for n, part in zip(self._judging[name], parts, strict=True):
                shards[n] = Shard(self._learnt[name], part, part)

    def training(self, work: Fit) -> Cost:
        """Return what training costs: a few steps of a client's own work."""

        directions, begun, done = self._session.recipe.local.directions, [work.start], list[Done]()
        few_numbers = sum(t.numel() for t in work.start.values()) <= FEW

        def run(name: str, steps: int) -> list[Done]:
            few = _shortened(work, steps, directions, len(self._learnt[name]))
            return self._run(self._names(name, self.lanes), few)

        def more() -> None:
            # On from where that has led, but in seed space, where every other place costs a rebuild.
            moved = replace(work, start=begun[-1])
            longer = _shortened(moved, 1 + MORE, directions, len(self._learnt[LARGE]))
            done[:] = self._run(self._names(LARGE, self.lanes), longer)
            if few_numbers and not work.seed_sequence:
                begun.append(done[0].params)

        tried = _interleaved(
            {"small": lambda: run(SMALL, 1), "large": lambda: run(LARGE, 1), "more": more}
        )
        moves = [difference(after, before) for before, after in itertools.pairwise(begun)]
        self.trained = Trained(moves[:2], replace(done[0], params={}))
        step = max((tried["more"].seconds - tried["large"].seconds) / MORE, 1e-9)
        piece = max(tried["large"].seconds - step, 0.0)
        short = max(tried["small"].seconds - piece, 1e-9)
        few, many = (
            sum(self.learnt_tokens([self._learnt[name]] * self.lanes)) for name in (SMALL, LARGE)
        )
        return Cost(
            piece / self.lanes,
            Line.through((few, short), (many, step)),
            _memory((few, tried["small"].memory), (many, tried["more"].memory)),
        )

    def judging(self) -> Cost:
        """Return what measuring the loss of held-out rows costs."""
        work = Evaluate(self._session.space.start(), "validation")
        tried = _interleaved(
            {name: partial(self._run, clients, work) for name, clients in self._judging.items()}
        )
        points = [(sum(self.judged_tokens(self.judged[n])), tried[n]) for n in (SMALL, LARGE)]
        seconds = Line.through(*((tokens, each.seconds) for tokens, each in points))
        return Cost(0.0, seconds, _memory(*((tokens, each.memory) for tokens, each in points)))

    def writing(self, at_once: int) -> Cost:
        """Return what generated answers cost; its lines are of a token more, in rows.

        Args:
            at_once: Answers of the largest batch: a token of few rows is no measure for one of many.
        """
        space = self._session.space
        space.load(space.start())
        model: Any = space.model
        plugged_in = self._session.evaluator.plugged_in
        most = min(PROMPT, *(len(row.ids) for row in self.held))
        first = torch.stack([row.ids[:most] for row in self.held[:at_once]])
        counts = sorted({max(1, at_once // 4), at_once})
        pieces: dict[str, Callable[[], object]] = {}
        for rows, tokens in itertools.product(counts, (1, 1 + MORE_TOKENS)):
            prompts = first.repeat(-(-rows // len(first)), 1)[:rows].to(space.device)
            write = partial(
                write_greedily,
                model,
                prompts,
                torch.ones_like(prompts),
                max_new_tokens=tokens,
                ends=[],
                fill=0,
            )
            pieces[f"{rows} {tokens}"] = write if plugged_in is None else _both(write, plugged_in)
        fast = self._fast()
        with evaluating(model), fast.evaluating() if fast else nullcontext():
            tried = _interleaved(pieces)

        def token(rows: int) -> float:
            longer = tried[f"{rows} {1 + MORE_TOKENS}"].seconds - tried[f"{rows} 1"].seconds
            return max(longer / MORE_TOKENS, 1e-9)

        seconds = Line.through(*((rows, token(rows)) for rows in (counts[0], counts[-1])))
        return Cost(0.0, seconds, Line(max(each.memory for each in tried.values()), 0.0))

    def loads(self) -> Loads:
        """Return what it costs to bring weights to coefficients other than the start's; nothing outside seed space."""
        space = self._session.space
        if not isinstance(space, SeedSpace):
            return Loads()

        def seconds(params: Params) -> float:
            began = time.perf_counter()
            space.load(params)
            return time.perf_counter() - began

        start, moved = space.start(), space.start()
        moved[COEFFICIENTS][0] = 1e-6
        plain = seconds(start)
        first, again = (max(seconds(moved) - plain, 0.0) for _ in range(2))
        space.load(start)
        return Loads(first, again)

    def learnt_tokens(self, steps: Sequence[Step]) -> list[int]:
        """Return the tokens, padding included, of each batch of one step of several lanes."""
        fast, like = self._fast(), torch.empty(0)
        if fast:
            size = self._session.recipe.local.rows
            return [batch.ids.numel() for batch in fast.batches(steps, size, like)]
        make = self._session.recipe.objective.batch
        return [make([step], [1], like, pack=False).ids.numel() for step in steps]

    def judged_tokens(self, rows: Sequence[Example]) -> list[int]:
        """Return the tokens, padding included, of each batch in which the loss of rows is measured."""
        forward = Forward.of(self._session.space.model)
        lengths = [row.num_tokens for row in rows]
        size = self._session.evaluator.batch_size
        return [len(chosen) * lengths[chosen[0]] for chosen in batches(lengths, size, forward)]

    def answered(self, rows: Sequence[Example]) -> Iterator[list[Example]]:
        """Yield the rows whose prompts are answered together, each with others of about its length."""
        model: Any = self._session.space.model
        lengths = [row.prompt_length for row in rows]
        size, padded = self._session.recipe.evaluation.batch_size, keeps_padding_out(model)
        for chosen in generation.batches(lengths, size, padded=padded):
            yield [rows[at] for at in chosen]

    def _fast(self) -> FastPath | None:
        trainer = self._session.trainer
        inner = trainer.sequential if isinstance(trainer, Cohort) else trainer
        return inner.fast if isinstance(inner, OneByOne) else None

    @staticmethod
    def _names(name: str, count: int) -> list[ClientId]:
        return [f"{name} {at}" for at in range(count)]

    def _run(self, clients: Sequence[ClientId], work: Work) -> list[Done]:
        jobs = [Job(client, 1, derive(0, client), work) for client in clients]
        return list(self._session.trainer.run(jobs))


def aligning(stage: AlignmentStage) -> Cost:
    """Return what a step of an emulator's alignment costs, by the tokens of its batch."""
    rows = _two_sizes(stage.examples, stage.batch_size)
    tried = _interleaved({name: partial(stage.slope, some) for name, some in rows.items()})
    sizes = {name: padded(some) for name, some in rows.items()}
    seconds = Line.through(*((sizes[n], tried[n].seconds) for n in (SMALL, LARGE)))
    return Cost(0.0, seconds, _memory(*((sizes[n], tried[n].memory) for n in (SMALL, LARGE))))


def padded(rows: Sequence[Example]) -> int:
    """Return the tokens of rows as one batch, padding included."""
    return len(rows) * max(len(row.ids) for row in rows)


def _both(write: Callable[[], object], plugged_in: PluggedIn) -> Callable[[], object]:
    """Return a function that lets the emulated model write, and then the whole one."""

    def written() -> None:
        write()
        with plugged_in.whole():
            write()

    return written


@dataclass(frozen=True)
class _Tried:
    seconds: float
    memory: float


def _interleaved(candidates: Mapping[str, Callable[[], object]]) -> dict[str, _Tried]:
    """Run each in turn, the first once before, as often as there is time for; return medians and peaks."""
    began = time.perf_counter()
    next(iter(candidates.values()))()  # what is made once is made now
    found: dict[str, list[_Tried]] = {name: [] for name in candidates}
    for _ in range(TURNS):
        turn = time.perf_counter()
        for name, run in candidates.items():
            with phase_memory("probe") as memory:
                at = time.perf_counter()
                run()
                seconds = time.perf_counter() - at
            peak = memory.get("memory/probe_bytes", peak_memory_bytes())
            found[name].append(_Tried(seconds, peak))
        now = time.perf_counter()
        if now - began + (now - turn) > ENOUGH_SECONDS:
            break
    return {
        name: _Tried(
            statistics.median(each.seconds for each in tried), max(each.memory for each in tried)
        )
        for name, tried in found.items()
    }


def _two_sizes(rows: Sequence[Example], whole: int) -> dict[str, list[Example]]:
    """Return rows of usual length: as many as a batch has, if they are not too many tokens, and a quarter of them."""
    usual = statistics.fmean(row.num_tokens for row in rows)
    typical = sorted(rows, key=lambda row: abs(row.num_tokens - usual))
    large = typical[: max(1, min(whole, int(TOKENS / usual)))]
    small = large[: len(large) // 4]
    # Of a single row, the other size is a shorter one.
    return {SMALL: small or [min(rows, key=lambda row: row.num_tokens)], LARGE: large}


def _shortened(work: Fit, steps: int, directions: int, rows: int) -> Fit:
    """Return a few steps of a client's work, for one that has so many rows."""
    if work.example_weights is not None:
        work = replace(work, example_weights=torch.ones(rows))
    if work.seed_sequence is None:
        return replace(work, steps=steps)
    few = params_map(lambda t: t[: steps * directions], work.seed_sequence)
    return replace(work, seed_sequence=few)


def _memory(small: tuple[float, float], large: tuple[float, float]) -> Line:
    """Return the line of peaks; flat where the larger has needed no more."""
    (x, y), (xx, yy) = small, large
    if yy <= y or xx <= x:
        return Line(max(y, yy), 0.0)
    return Line(y - (yy - y) / (xx - x) * x, (yy - y) / (xx - x))
