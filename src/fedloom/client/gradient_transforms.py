"""What an algorithm does to its clients' gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.core.protocols import Fit, Params, Tail
from fedloom.spaces.live import Layout, Tunable


@dataclass
class GradientTransforms:
    """What the jobs do to a gradient, (lanes, numel) each; None where no job asks for it."""

    strength: Tensor | None
    """(lanes, 1), or (lanes, numel) where some centers have some of the tensors only."""
    anchor: Tensor | None
    tails: "Tails | None"
    offset: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, fits: Sequence[Fit], space: Tunable) -> "GradientTransforms":
        centers = [_center(fit) for fit in fits]
        pulled = any(fit.proximal and fit.proximal.strength for fit in fits)
        return cls(
            _strengths(fits, space) if pulled else None,
            rows(centers, space.absolute_vector) if pulled else None,
            Tails.of([fit.tail for fit in fits], space),
            _optional([fit.gradient_offset for fit in fits], space, 0.0),
            _optional([fit.mask for fit in fits], space, 1.0),
        )

    def apply_(self, gradients: Tensor, values: Tensor) -> None:
        if self.strength is not None and self.anchor is not None:
            gradients.add_(self.strength * (values - self.anchor))
        if self.tails is not None:
            self.tails.add_(gradients, values)
        if self.offset is not None:
            gradients.add_(self.offset)
        if self.mask is not None:
            gradients.mul_(self.mask)

    def keep(self, lanes: Tensor) -> None:
        self.strength, self.anchor, self.offset, self.mask = (
            None if t is None else t[lanes]
            for t in (self.strength, self.anchor, self.offset, self.mask)
        )
        if self.tails is not None:
            self.tails.keep(lanes)


@dataclass
class Tails:
    """The jobs' `Fit.tail`; a job without one has no strength."""

    layout: Layout
    factors: Sequence[tuple[str, str]]
    strength: Tensor
    """(lanes,)"""
    first: Tensor
    """(lanes,) int64, and `last` too."""
    last: Tensor

    @classmethod
    def of(cls, tails: Sequence[Tail | None], space: Tunable) -> "Tails | None":
        asked = [tail for tail in tails if tail and tail.strength]
        if not asked:
            return None
        ends = [(tail.first, tail.last) if tail else (0, 0) for tail in tails]
        bounds = torch.tensor(ends, device=space.values.device)
        strengths = torch.tensor(
            [tail.strength if tail else 0.0 for tail in tails], dtype=torch.float64
        )
        factors = asked[0].factors
        assert all(tail.factors == factors for tail in asked)
        return cls(space.layout, factors, strengths.to(space.values), bounds[:, 0], bounds[:, 1])

    def add_(self, gradients: Tensor, values: Tensor) -> None:
        """Add the gradient, of |B| |A| by A that of |A|, A / |A|, times |B|; 0 where a factor is."""
        into, of = self.layout.split(gradients), self.layout.split(values)
        for name_a, name_b in self.factors:
            at = torch.arange(of[name_a].shape[1], device=values.device)
            inside = (at >= self.first[:, None]) & (at < self.last[:, None])  # (lanes, rank)
            a, b = of[name_a] * inside[:, :, None], of[name_b] * inside[:, None, :]
            norm_a, norm_b = (torch.linalg.matrix_norm(t, keepdim=True) for t in (a, b))
            each = self.strength[:, None, None]
            into[name_a].add_(torch.where(norm_a > 0, each * norm_b / norm_a, 0.0) * a)
            into[name_b].add_(torch.where(norm_b > 0, each * norm_a / norm_b, 0.0) * b)

    def keep(self, lanes: Tensor) -> None:
        """Go on with these lanes only."""
        self.strength, self.first, self.last = (
            t[lanes] for t in (self.strength, self.first, self.last)
        )


def _center(fit: Fit) -> Params:
    """Return where a pull leads to; where it leads nowhere, what training begins at."""
    if fit.proximal is None:
        return fit.start
    center = fit.proximal.center
    return center if len(center) == len(fit.start) else {**fit.start, **center}


def _strengths(fits: Sequence[Fit], space: Tunable) -> Tensor:
    pulls = [(fit.proximal.strength if fit.proximal else 0.0, fit) for fit in fits]
    if all(fit.proximal is None or len(fit.proximal.center) == len(fit.start) for fit in fits):
        each = torch.tensor([strength for strength, _ in pulls], dtype=torch.float64)
        return each.to(space.values).unsqueeze(1)
    by_name = [
        {
            name: torch.tensor(
                strength if fit.proximal and name in fit.proximal.center else 0.0,
                dtype=torch.float64,
            )
            for name in space.layout.shapes
        }
        for strength, fit in pulls
    ]
    return rows(by_name, space.vector)


def rows(trees: Sequence[Params], flatten: Callable[[Params], Tensor]) -> Tensor:
    """Return (trees, numel); an object that occurs twice is flattened once, and is a view where all are one."""
    flat = {id(tree): tree for tree in trees}
    vectors = {key: flatten(tree) for key, tree in flat.items()}
    if len(vectors) == 1:
        return next(iter(vectors.values())).expand(len(trees), -1)
    return torch.stack([vectors[id(tree)] for tree in trees])


def _optional(trees: Sequence[Params | None], space: Tunable, neutral: float) -> Tensor | None:
    """Return (trees, numel) with `neutral` where a job asks for nothing, or None where none does."""
    if all(tree is None for tree in trees):
        return None
    nothing = {name: torch.tensor(neutral) for name in space.layout.shapes}
    return rows([nothing if tree is None else tree for tree in trees], space.vector)
