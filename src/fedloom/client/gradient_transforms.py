"""What an algorithm does to its clients' gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.core.protocols import Fit, Params
from fedloom.spaces.live import Tunable


@dataclass
class GradientTransforms:
    """What the jobs do to a gradient, (lanes, numel) each; None where no job asks for it."""

    strength: Tensor | None
    """(lanes, 1), or (lanes, numel) where some centers have some of the tensors only."""
    anchor: Tensor | None
    offset: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, fits: Sequence[Fit], space: Tunable) -> "GradientTransforms":
        centers = [_center(fit) for fit in fits]
        pulled = any(fit.proximal and fit.proximal.strength for fit in fits)
        return cls(
            _strengths(fits, space) if pulled else None,
            rows(centers, space.absolute_vector) if pulled else None,
            _optional([fit.gradient_offset for fit in fits], space, 0.0),
            _optional([fit.mask for fit in fits], space, 1.0),
        )

    def apply_(self, gradients: Tensor, values: Tensor) -> None:
        if self.strength is not None and self.anchor is not None:
            gradients.add_(self.strength * (values - self.anchor))
        if self.offset is not None:
            gradients.add_(self.offset)
        if self.mask is not None:
            gradients.mul_(self.mask)

    def keep(self, lanes: Tensor) -> None:
        self.strength, self.anchor, self.offset, self.mask = (
            None if t is None else t[lanes]
            for t in (self.strength, self.anchor, self.offset, self.mask)
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
