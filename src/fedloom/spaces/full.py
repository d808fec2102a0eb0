"""All weights of the model, or those that are named, learnt themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from fedloom.core.protocols import Params
from fedloom.models.adapters import trainable
from fedloom.models.build import Base, write_model
from fedloom.models.quantized import check_unquantized
from fedloom.spaces.live import Live, Origin, check_names, check_origin, learnable


@dataclass(frozen=True, slots=True)
class Full:
    """Learn the weights themselves."""

    weights: Sequence[str] = ()
    """Learn only tensors with one of these in their name, as whole parts between dots (mlp, layers.0, norm.weight);
    none: all of them."""
    origin: Origin = "initial"
    """Where coordinates count from: the start everybody shares, or nothing."""

    is_adapter: ClassVar[bool] = False
    is_seed_space: ClassVar[bool] = False
    virtual_tokens: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check_names(self.weights, path="tune.full.weights")
        check_origin(self.origin, path="tune.full.origin")

    @property
    def title(self) -> str:
        return "full"

    def make_space(self, base: Base, *, seed: int, decays: bool = False) -> "FullSpace":
        return FullSpace(base, self)


def check_learnable_type(model: nn.Module, *, setting: str) -> None:
    """Refuse to learn weights themselves where they are rounded; `setting` is what asks for it."""
    check_unquantized(model, f"where {setting} is full, which learns the weights themselves")
    low = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
    if low:
        raise ValueError(
            f"{setting}: full learns the weights themselves, which needs model.dtype float32,"
            f" got {str(low.pop()).removeprefix('torch.')}; local.precision bfloat16 makes it fast"
        )


class FullSpace(Live):
    """Every weight of the model; tied weights are one tensor."""

    def __init__(self, base: Base, full: Full) -> None:
        check_learnable_type(base.model, setting="tune")
        base.model.requires_grad_(False)
        tensors, left = learnable(base.model, full.weights, path="tune.full.weights")
        for parameter in tensors.values():
            parameter.requires_grad_(True)
        self._base = base
        super().__init__(base.model, trainable(base.model), origin=full.origin, left_frozen=left)

    def save(self, folder: Path, params: Params) -> None:
        self.save_merged(folder, params)

    def save_merged(self, folder: Path, params: Params) -> None:
        self.load(params)
        write_model(self._base, folder)
