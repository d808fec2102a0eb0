"""Weights seen shifted by a product of thin matrices, beside the layer: y = x W^T + (x V) U^T.

No weight is copied or written, so W may be of any type, or in few bits: what has been moved since the start stays a list of
coefficients, whose factors are drawn where a layer needs them. Chen et al., "LOZO", arXiv:2410.07698.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.client.perturbed_weights import Ground, PerturbedWeight, watched
from fedloom.core.protocols import Params
from fedloom.models.introspection import is_transposed
from fedloom.models.quantized import QuantizedLinear
from fedloom.spaces.directions.lowrank import Drawn
from fedloom.spaces.seed_space import SeedSpace


class PerturbedLowRank(Ground):
    """Ground of low-rank directions; norms and other small tensors are shifted in a scratch.

    In float32 a step is added to the weights themselves; other types would lose it, and few bits cannot take it.
    """

    def __init__(self, space: SeedSpace, leaves: Sequence[PerturbedWeight]) -> None:
        super().__init__(space, leaves)
        self._keeps = self._low or space.is_quantized
        self._moved: dict[int, float] = {}
        self._drawn_for: tuple[int, ...] = ()
        self._drawn: Mapping[str, Drawn] = {}
        self._shrink = 1.0

    @contextmanager
    def at(self, params: Params) -> Iterator["PerturbedLowRank"]:
        self._space.load(params)
        others = [leaf for leaf in self._leaves if not _is_product(leaf)]
        size = max((leaf.numel for leaf in others), default=0)
        self._scratch = self._space.values.new_empty(size)
        with ExitStack() as stack:
            for leaf in self._leaves:
                if leaf in others:
                    stack.callback(self._leave, leaf)
                    stack.enter_context(watched(leaf, self._enter, self._leave))
                else:
                    stack.callback(leaf.module.register_forward_hook(self._beside(leaf)).remove)
            yield self

    def move_(self, ks: Sequence[int], by: Sequence[float], *, shrink: float) -> None:
        if not self._keeps:
            super().move_(ks, by, shrink=shrink)
            self._catch_up()
            return
        self._shrink *= shrink
        self._moved = {k: far * shrink for k, far in self._moved.items()}
        for k, far in zip(ks, by, strict=True):
            self._moved[k] = self._moved.get(k, 0.0) + far

    def _settled(self, name: str) -> Tensor:
        ks, by = self._move
        if name not in self._behind or tuple(ks) != self._drawn_for:
            return super()._settled(name)
        values = self._walked[name]
        self._behind.remove(name)
        drawn = self._drawn.get(name)
        return self._directions.shift(name, values, ks, by, out=values, drawn=drawn)

    def _seen(self) -> tuple[list[int], list[float]]:
        """Return the directions in which layers are seen moved, and how far."""
        return [*self._moved, *self._look[0]], [*self._moved.values(), *self._look[1]]

    def _enter(self, leaf: PerturbedWeight) -> None:
        for (name, _), view in zip(leaf.tensors, self._views(leaf), strict=True):
            torch.mul(self._own[name], self._shrink, out=view)
            self._directions.shift(name, view, *self._seen(), out=view)

    def _beside(self, leaf: PerturbedWeight) -> Any:
        """Return the hook that adds what a layer's moved tensors make of its input."""
        kinds = {name.rpartition(".")[2]: name for name, _ in leaf.tensors}
        is_table = leaf.is_table

        def after(_module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
            ks, by = self._seen()
            if not ks and self._shrink == 1:
                return out
            (x,) = inputs
            wide = out.to(torch.promote_types(out.dtype, torch.float32))
            if self._shrink != 1:
                wide = wide * self._shrink
            if is_table:
                rows, where = torch.unique(x, return_inverse=True)
                u, v = self._update(kinds["weight"], ks, by, rows=rows)
                return (wide + u[where] @ v.mT).to(out.dtype)
            u, v = self._factors_of(leaf, kinds["weight"], ks, by)
            narrow = x.to(wide.dtype).flatten(0, -2) @ v.to(wide.dtype)
            # In place: what the layer or the conversion returned is nobody else's.
            wide.flatten(0, -2).addmm_(narrow, u.to(wide.dtype).mT)
            if "bias" in kinds:
                nothing = torch.zeros_like(self._own[kinds["bias"]], dtype=wide.dtype)
                wide = wide + self._directions.shift(kinds["bias"], nothing, ks, by, out=nothing)
            return wide.to(out.dtype)

        return after

    def _factors_of(
        self, leaf: PerturbedWeight, name: str, ks: Sequence[int], by: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Return U (out, R) and V (in, R); kept until the next layer, since a head is asked chunk by chunk."""
        if self._held is not leaf:
            u, v = self._update(name, ks, by)
            self._pair = (v, u) if is_transposed(leaf.module) else (u, v)
            self._held = leaf
        return self._pair

    def _update(
        self, name: str, ks: Sequence[int], by: Sequence[float], *, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the factors of a matrix's shift; those of a look ahead serve the look behind, and the step."""
        if self._keeps:  # of all steps so far: drawn again rather than kept
            return self._space.update(name, ks, by, rows=rows)
        if self._drawn_for != tuple(ks):
            self._drawn_for, self._drawn = tuple(ks), self._directions.thin(ks)
        return self._space.update(name, ks, by, rows=rows, drawn=self._drawn[name])


def _is_product(leaf: PerturbedWeight) -> bool:
    """Return whether a layer multiplies with its weight and adds its bias, or looks up rows: then so does its update."""
    linear = type(leaf.module) in (nn.Linear, QuantizedLinear) or is_transposed(leaf.module)
    moves = any(name.endswith("weight") for name, _ in leaf.tensors)
    return moves and (leaf.is_table or linear)
