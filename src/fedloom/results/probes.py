"""What a step of training and an answer to be judged cost here: seconds and memory, from two sizes of each.

Nothing of a recipe's own size is run. Time and memory are lines in the number of tokens, and two points make a line.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from fedloom.client.cohort import Cohort
from fedloom.client.make_trainer import GROUPS
from fedloom.client.trainer import OneByOne
from fedloom.core.params import params_map
from fedloom.core.protocols import ClientId, Evaluate, Fit, Job, Work
from fedloom.core.randomness import derive
from fedloom.data.federation import Shard
from fedloom.data.tokens import Example
from fedloom.evaluation.scoring import evaluating
from fedloom.models.generation import write_greedily
from fedloom.rounds.session import Session
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
"""Measuring is not repeated where it has taken longer."""
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
        whole = local.batch_size * local.accumulation
        self._session = session
        self._learnt = _two_sizes([row for shard in known for row in shard.train], whole)
        held = [row for shard in known for row in (*shard.validation, *shard.test)]
        judging = session.recipe.evaluation
        # Of more rows the evaluator would draw some.
        at_once = min(judging.batch_size, judging.max_examples or judging.batch_size)
        self.held = held
        """All rows that may be measured."""
        self.judged = _two_sizes(held, at_once) if held else {}
        for name, rows in self._learnt.items():
            judged = self.judged.get(name, [])
            shards.update({n: Shard(rows, judged, judged) for n in self._names(name)})

    def training(self, work: Fit) -> Cost:
        """Return what training costs: a few steps of a client's own work."""

        local = self._session.recipe.local

        def run(name: str, steps: int) -> None:
            self._run(self._names(name), _shortened(work, steps, local.directions))

        tried = _interleaved(
            {
                "small": lambda: run(SMALL, 1),
                "large": lambda: run(LARGE, 1),
                "more": lambda: run(LARGE, 1 + MORE),
            }
        )
        step = max((tried["more"].seconds - tried["large"].seconds) / MORE, 1e-9)
        piece = max(tried["large"].seconds - step, 0.0)
        short = max(tried["small"].seconds - piece, 1e-9)
        few, many = (self.lanes * tokens_of(self._learnt[name]) for name in (SMALL, LARGE))
        return Cost(
            piece / self.lanes,
            Line.through((few, short), (many, step)),
            _memory((few, tried["small"].memory), (many, tried["more"].memory)),
        )

    def judging(self) -> Cost:
        """Return what measuring the loss of held-out rows costs."""
        work = Evaluate(self._session.space.start(), "validation")
        tried = _interleaved(
            {name: partial(self._run, self._names(name)[:1], work) for name in (SMALL, LARGE)}
        )
        points = [(tokens_of(self.judged[name]), tried[name]) for name in (SMALL, LARGE)]
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
        most = min(PROMPT, *(len(row.ids) for row in self.held))
        first = torch.stack([row.ids[:most] for row in self.held[:at_once]])
        counts = sorted({max(1, at_once // 4), at_once})
        pieces: dict[str, Callable[[], object]] = {}
        for rows, tokens in product(counts, (1, 1 + MORE_TOKENS)):
            prompts = first.repeat(-(-rows // len(first)), 1)[:rows].to(space.device)
            pieces[f"{rows} {tokens}"] = partial(
                write_greedily,
                model,
                prompts,
                torch.ones_like(prompts),
                max_new_tokens=tokens,
                ends=[],
                fill=0,
            )
        with evaluating(model), self._fast_evaluating():
            tried = _interleaved(pieces)

        def token(rows: int) -> float:
            longer = tried[f"{rows} {1 + MORE_TOKENS}"].seconds - tried[f"{rows} 1"].seconds
            return max(longer / MORE_TOKENS, 1e-9)

        seconds = Line.through(*((rows, token(rows)) for rows in (counts[0], counts[-1])))
        return Cost(0.0, seconds, Line(max(each.memory for each in tried.values()), 0.0))

    def _fast_evaluating(self) -> AbstractContextManager[object]:
        trainer = self._session.trainer
        inner = trainer.sequential if isinstance(trainer, Cohort) else trainer
        return inner.fast.evaluating() if isinstance(inner, OneByOne) else nullcontext()

    def _names(self, name: str) -> list[ClientId]:
        return [f"{name} {lane}" for lane in range(self.lanes)]

    def _run(self, clients: Sequence[ClientId], work: Work) -> None:
        jobs = [Job(client, 1, derive(0, client), work) for client in clients]
        self._session.trainer.run(jobs)


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
        for name, run in candidates.items():
            at = time.perf_counter()
            with phase_memory("probe") as memory:
                run()
            peak = memory.get("memory/probe_bytes", peak_memory_bytes())
            found[name].append(_Tried(time.perf_counter() - at, peak))
        if time.perf_counter() - began > ENOUGH_SECONDS:
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


def tokens_of(rows: Sequence[Example]) -> int:
    """Return the tokens of all rows together."""
    return sum(row.num_tokens for row in rows)


def _shortened(work: Fit, steps: int, directions: int) -> Fit:
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
