"""A client's training in several parts, in each of which some tensors learn and the others rest."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from fedloom.core.protocols import Done, Fit, Params, Work
from fedloom.core.wrapper import extended

Train = Literal["local", "shared", "all"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a client's round, in which some tensors learn and the others rest."""

    train: Train
    """What learns: the client's own tensors, the shared ones, or both."""
    steps: int | None = None
    """Optimizer steps; None: as many as `local` says."""
    from_round: int = 1
    """The first round that has this phase."""

    def __post_init__(self) -> None:
        if self.train not in get_args(Train):
            raise ValueError(
                f"personal.phases train must be local, shared or all, got {self.train!r}"
            )
        for name, value in (("steps", self.steps), ("from_round", self.from_round)):
            if value is not None and value < 1:
                raise ValueError(f"personal.phases {name} must be at least 1, got {value}")


def in_phases(
    phases: Sequence[Phase], work: Fit, own: Params, *, round: int
) -> Generator[Work, Done, tuple[Done, Params]]:
    """Train what an inner algorithm asks for and a client's own tensors; return what it is told, and those.

    Args:
        phases: One after another; none: all learns at once.
        work: On the shared tensors.
        own: What else there is; where that is nothing, phases of it alone are left out.
        round: From 1.
    """
    every: list[Done] = []
    told: list[Done] = []
    for phase in phases or (Phase("all"),):
        if phase.from_round > round or (phase.train == "local" and not own):
            continue
        done = yield _of_phase(replace(work, steps=phase.steps or work.steps), own, phase.train)
        every.append(done)
        # What rests is not what comes back: counted from another origin, it may be rounded.
        if phase.train != "local":
            work = replace(work, start={name: done.params[name] for name in work.start})
            told.append(done)
        if phase.train != "shared":
            own = {name: done.params[name] for name in own}
    return replace(_together(told, every), params=work.start), own


def _of_phase(work: Fit, own: Params, train: Train) -> Work:
    if train == "local":
        still = {n: torch.zeros((), dtype=t.dtype) for n, t in work.start.items()}
        work = replace(work, proximal=None, gradient_offset=None, mask=still)
    return extended(work, own, learns=train != "shared")


def _together(told: Sequence[Done], every: Sequence[Done]) -> Done:
    """Return as one what moved the shared tensors; the tokens and skipped steps are those of all phases."""
    if len(every) == 1:
        return every[0]
    last = told[-1]
    sums = [done.lr_sum for done in told if done.lr_sum is not None]
    counts = {
        name: sum(done.metrics.get(name, 0.0) for done in every)
        for name in ("num_tokens", "skipped_steps")
        if name in last.metrics
    }
    return replace(
        last,
        num_steps=sum(done.num_steps for done in told),
        lr_sum=sum(sums) if len(sums) == len(told) else None,
        metrics={**last.metrics, **counts},
    )
