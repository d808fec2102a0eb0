"""Weights seen shifted, layer by layer: what is stored is only read, and memory grows by the largest layer.

A layer that owns tensors finds them shifted in a scratch as it is entered, and its own back in place as it is left.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.client.fast.kernels import replaced_forward
from fedloom.core.protocols import Params
from fedloom.spaces.seed_space import SeedSpace


@dataclass(frozen=True, slots=True, eq=False)
class PerturbedWeight:
    """A layer with tensors of its own; tied tensors belong to each of their layers."""

    module: nn.Module
    tensors: tuple[tuple[str, nn.Parameter], ...]
    """With the names they have in the space."""

    @property
    def is_table(self) -> bool:
        """Return whether it is a plain embedding, of which a batch reads some rows."""
        return type(self.module) is nn.Embedding and self.module.max_norm is None

    @property
    def numel(self) -> int:
        """Return the scratch it takes."""
        return 0 if self.is_table else sum(parameter.numel() for _, parameter in self.tensors)


def perturbed_weights_of(space: SeedSpace) -> list[PerturbedWeight]:
    """Return the layers through which all tensors of the space are read.

    Raises:
        ValueError: where the model reads a tensor past the layer that owns it, so that a shift would go unseen.
    """
    names = {id(parameter): name for name, parameter in space.tensors.items()}
    leaves = []
    for module in space.model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) in names]
        if own:
            leaves.append(PerturbedWeight(module, tuple((names[id(p)], p) for p in own)))
    if not _all_are_entered(space, leaves):
        raise ValueError(
            "tune: seeds needs a model whose layers alone read their tensors, but this one"
            f" ({type(space.model).__name__}) reads some from outside"
        )
    return leaves


@torch.no_grad()
def _all_are_entered(space: SeedSpace, leaves: Sequence[PerturbedWeight]) -> bool:
    """Look for what is read from outside: there it finds nothing but NaN, which takes no memory."""
    own = {p: p.data for leaf in leaves for _, p in leaf.tensors if p.is_floating_point()}

    def enter(leaf: PerturbedWeight) -> None:
        for _, parameter in leaf.tensors:
            parameter.data = own.get(parameter, parameter.data)

    def leave(leaf: PerturbedWeight) -> None:
        for _, parameter in leaf.tensors:
            if parameter in own:
                parameter.data = torch.full((), torch.nan).to(parameter).expand(parameter.shape)

    with ExitStack() as stack:
        for leaf in leaves:
            leave(leaf)
            stack.callback(enter, leaf)
            stack.enter_context(watched(leaf, enter, leave))
        ids = torch.arange(4, device=space.device)[None]
        return not bool(space.model(input_ids=ids, use_cache=False).logits.isnan().any())


@contextmanager
def watched(
    leaf: PerturbedWeight,
    enter: Callable[[PerturbedWeight], None],
    leave: Callable[[PerturbedWeight], None],
) -> Iterator[None]:
    """Call `enter` before a layer's forward and `leave` after it."""

    def before(_module: nn.Module, _inputs: Any) -> None:
        enter(leaf)

    def after(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        leave(leaf)

    first, second = (
        leaf.module.register_forward_pre_hook(before),
        leaf.module.register_forward_hook(after),
    )
    try:
        yield
    finally:
        first.remove()
        second.remove()


class Ground:
    """Weights where a client stands on its seed sequence; layers find them, shifted, in a scratch of the largest layer.

    In float32 the weights that move are the model's own. In half precision, which would lose most of a step, they are
    a float32 copy, and layers find them rounded.
    """

    def __init__(self, space: SeedSpace, leaves: Sequence[PerturbedWeight]) -> None:
        self._space, self._leaves, self._directions = space, leaves, space.directions
        self._low = space.values.dtype in (torch.bfloat16, torch.float16)
        self._own = space.seated.layout.split(space.values)
        self._walked, self._flat = self._own, space.values
        self._scratch = space.values.new_empty(0)
        self._look: tuple[Sequence[int], Sequence[float]] = (), ()
        self._move: tuple[Sequence[int], Sequence[float]] = (), ()
        self._behind: set[str] = set()
        self._held: PerturbedWeight | None = None

    @contextmanager
    def at(self, params: Params) -> Iterator["Ground"]:
        """Let the model's layers stand at params while work runs."""
        space = self._space
        space.load(params)
        if self._low:
            self._flat = space.wide(params)
            self._walked = space.seated.layout.split(self._flat)
        self._scratch = space.values.new_empty(max(leaf.numel for leaf in self._leaves))
        with ExitStack() as stack:
            for leaf in self._leaves:
                if leaf.is_table:
                    stack.enter_context(replaced_forward(leaf.module, self._rows_of(leaf)))
                else:
                    stack.callback(self._leave, leaf)
                    stack.enter_context(watched(leaf, self._enter, self._leave))
            yield self
            self._catch_up()

    @contextmanager
    def looking(self, ks: Sequence[int], by: Sequence[float]) -> Iterator[None]:
        """Let forwards see the weights shifted by sum_i by_i z_{k_i}."""
        self._look, self._held = (ks, by), None
        try:
            yield
        finally:
            self._look, self._held = ((), ()), None

    def move_(self, ks: Sequence[int], by: Sequence[float], *, shrink: float) -> None:
        """Move the weights to shrink times what they are, plus sum_i by_i z_{k_i}.

        A tensor moves as the next look reads it, in the same pass over memory.
        """
        self._catch_up()
        if shrink != 1:
            self._flat.mul_(shrink)
        self._move, self._behind = (ks, by), set(self._walked)

    def _catch_up(self) -> None:
        """Move what no look has read since the last step."""
        for name in sorted(self._behind):
            self._settled(name)

    def _settled(self, name: str) -> Tensor:
        """Return a tensor where the client stands."""
        values = self._walked[name]
        if name in self._behind:
            self._behind.remove(name)
            self._directions.shift(name, values, *self._move, out=values)
        return values

    def _enter(self, leaf: PerturbedWeight) -> None:
        if not self._low and not self._look[0]:
            for name, _ in leaf.tensors:
                self._settled(name)
            return
        for (name, _), view in zip(leaf.tensors, self._views(leaf), strict=True):
            # A head is entered once for each of many chunks.
            if self._held is not leaf:
                self._see(name, out=view)
        self._held = leaf

    def _see(self, name: str, *, out: Tensor) -> None:
        """Write a tensor as the look sees it."""
        (ks, by), values = self._look, self._walked[name]
        if name not in self._behind:
            self._directions.shift(name, values, ks, by, out=out)
            return
        self._behind.remove(name)
        moves, far = self._move
        self._directions.advance(
            name, values, [*moves, *ks], [*far, *by], moves=len(moves), out=out
        )

    def _views(self, leaf: PerturbedWeight) -> list[Tensor]:
        """Put a layer's tensors into the scratch, and return them there."""
        views, at = [], 0
        for _, parameter in leaf.tensors:
            views.append(self._scratch[at : at + parameter.numel()].view(parameter.shape))
            at += parameter.numel()
            parameter.data = views[-1]
        return views

    def _leave(self, leaf: PerturbedWeight) -> None:
        for name, parameter in leaf.tensors:
            parameter.data = self._own[name]

    def _rows_of(self, leaf: PerturbedWeight) -> Callable[[Tensor], Tensor]:
        ((name, _),) = leaf.tensors

        def forward(ids: Tensor) -> Tensor:
            rows, where = torch.unique(ids, return_inverse=True)
            given = self._settled(name)[rows]
            if not self._low and not self._look[0]:
                return given[where]
            seen = self._scratch.new_empty(given.shape)
            return self._directions.shift(name, given, *self._look, out=seen, rows=rows)[where]

        return forward
