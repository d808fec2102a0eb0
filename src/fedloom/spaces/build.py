"""What is tuned: the recipe's `tune` section, and the space it stands for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch

from fedloom.core.protocols import Params
from fedloom.core.randomness import derive
from fedloom.models.adapters import LoRA, attach_lora, trainable
from fedloom.models.base_model import Base
from fedloom.models.folder import write_model
from fedloom.models.int8 import is_quantized
from fedloom.spaces.directions.directions import Directions
from fedloom.spaces.directions.stream import Law
from fedloom.spaces.live import Live, Origin
from fedloom.spaces.named import learnable
from fedloom.spaces.seed_space import SeedSpace

Kind = Literal["lora", "full", "seeds"]


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """Which coordinates of the model are learnt: the recipe's `tune` section."""

    space: Kind = "lora"
    """lora: low-rank adapters on a frozen base; full: every weight; seeds: how far every weight goes along each of a
    few thousand random directions."""
    rank: int = 8
    """Of the adapters."""
    alpha: float = 16.0
    """The update is alpha / rank (rslora: alpha / sqrt(rank)) times B A."""
    dropout: float = 0.0
    """Of the adapters' input, [0, 1)."""
    rslora: bool = False
    """Scale by the root of the rank (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Tune magnitude and direction apart (Liu et al. 2024, arXiv:2402.09353)."""
    targets: str | Sequence[str] = "all-linear"
    """Linear layers that get an adapter, by the end of their name."""
    modules_to_save: Sequence[str] = ()
    """Modules that are tuned whole beside the adapters."""
    origin: Origin = "initial"
    """Where coordinates count from: the start everybody shares, or nothing."""
    num_seeds: int = 4096
    """Directions of the pool, where space is seeds."""
    law: Law = "gaussian"
    """Of the directions: gaussian; rademacher (+-1) or popcount (sums of sixteen coins, nearly normal), both faster
    and summed without rounding; lowrank (a product of two thin matrices), for which no weight is copied."""
    law_rank: int = 1
    """Of law lowrank."""
    weights: Sequence[str] = ()
    """Of spaces full and seeds: learn only tensors with one of these in their name, as whole parts between dots (mlp,
    layers.0, norm.weight); none: all of them."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.space not in get_args(Kind):
            raise ValueError(f"tune.space must be {_one_of(Kind)}, got {self.space}")
        for name, number in (
            ("rank", self.rank),
            ("num_seeds", self.num_seeds),
            ("law_rank", self.law_rank),
        ):
            if number < 1:
                raise ValueError(f"tune.{name} must be at least 1, got {number}")
        if not self.alpha > 0:
            raise ValueError(f"tune.alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"tune.dropout must be in [0, 1), got {self.dropout}")
        if self.origin not in get_args(Origin):
            raise ValueError(f"tune.origin must be {_one_of(Origin)}, got {self.origin}")
        if self.law not in get_args(Law):
            raise ValueError(f"tune.law must be {_one_of(Law)}, got {self.law}")
        if not self.targets:
            raise ValueError("tune.targets must be all-linear or name linear layers, got none")
        for name, names in (("modules_to_save", self.modules_to_save), ("weights", self.weights)):
            if isinstance(names, str):
                raise ValueError(f"tune.{name} must be a list, got {names}")
        self._check_owners()

    def _check_owners(self) -> None:
        """Refuse settings of another space: they would have no effect."""
        sizes = (self.rank, self.alpha, self.targets)
        asked = self.dropout or self.rslora or self.dora or self.modules_to_save
        if self.space != "lora" and (asked or sizes != (8, 16.0, "all-linear")):
            raise ValueError(
                "tune.rank, alpha, targets, dropout, rslora, dora and modules_to_save belong to"
                f" tune.space lora, got {self.space}"
            )
        if self.space == "lora" and self.weights:
            raise ValueError("tune.weights belongs to tune.space full and seeds, got lora")
        pool = (self.num_seeds, self.law, self.law_rank)
        if self.space != "seeds" and pool != (4096, "gaussian", 1):
            raise ValueError(
                f"tune.num_seeds, law and law_rank belong to tune.space seeds, got {self.space}"
            )
        if self.space == "seeds" and self.origin != "initial":
            raise ValueError(
                f"tune.origin must be initial where tune.space is seeds, got {self.origin}"
            )
        if self.law != "lowrank" and self.law_rank != 1:
            raise ValueError(f"tune.law_rank belongs to tune.law lowrank, got {self.law}")


def _one_of(kinds: object) -> str:
    *most, last = get_args(kinds)
    return f"{', '.join(most)} or {last}"


class Tuned(Protocol):
    """What make_space adds to a space's coordinates: folders of deployed weights, and what is none of them."""

    left_frozen: str
    """What stays frozen although it might have been expected to learn, in a sentence; empty where there is nothing."""

    def save(self, folder: Path, params: Params) -> None:
        """Write params as others read them: a PEFT folder, or of full tuning a whole model."""
        ...

    def save_merged(self, folder: Path, params: Params) -> None:
        """Write a plain model that needs no adapter."""
        ...


class LoRASpace(Live):
    """The trainable tensors of a PEFT adapter."""

    def __init__(self, base: Base, tune: TuneSettings, *, seed: int) -> None:
        lora = LoRA(
            tune.rank,
            tune.alpha,
            tune.dropout,
            tune.rslora,
            tune.dora,
            tune.targets,
            tune.modules_to_save,
        )
        self._adapter = attach_lora(base.model, lora, seed=seed, base_name=base.name)
        self._tokenizer = base.tokenizer
        self.dropout, self.left_frozen = tune.dropout, self._adapter.left_frozen
        super().__init__(base.model, trainable(base.model), origin=tune.origin)

    def save(self, folder: Path, params: Params) -> None:
        self._adapter.save(folder, self.absolute(params))

    def save_merged(self, folder: Path, params: Params) -> None:
        if is_quantized(self.model):
            raise ValueError(
                "model.quantize must be none for a merged model, got int8: export the adapter alone"
            )
        self.load(params)
        self._adapter.save_merged(folder, self._tokenizer)


class FullSpace(Live):
    """Every weight of the model; tied weights are one tensor."""

    def __init__(self, base: Base, tune: TuneSettings) -> None:
        low = {p.dtype for p in base.model.parameters()} & {torch.bfloat16, torch.float16}
        if low:
            raise ValueError(
                "tune.space full tunes the weights themselves, which needs model.dtype float32,"
                f" got {str(low.pop()).removeprefix('torch.')}; local.precision bfloat16 makes it fast"
            )
        base.model.requires_grad_(False)
        tensors, self.left_frozen = learnable(base.model, tune.weights)
        for parameter in tensors.values():
            parameter.requires_grad_(True)
        self._base = base
        super().__init__(base.model, trainable(base.model), origin=tune.origin)

    def save(self, folder: Path, params: Params) -> None:
        self.save_merged(folder, params)

    def save_merged(self, folder: Path, params: Params) -> None:
        self.load(params)
        write_model(self._base, folder)


def make_space(
    base: Base, tune: TuneSettings, *, seed: int, decays: bool = False
) -> LoRASpace | FullSpace | SeedSpace:
    """Return the space over the base model, which it changes in place: one space a model.

    Args:
        base: the model.
        tune: what is learnt of it.
        seed: of fresh adapters, and of directions.
        decays: whether clients' zeroth-order steps shrink the weights themselves, which seeds keep as a coordinate.

    Raises:
        ValueError: where a target or a module to save does not exist, or the weights cannot be tuned.
    """
    if is_quantized(base.model):
        _check_quantized(tune)
    if tune.space == "full":
        return FullSpace(base, tune)
    if tune.space == "lora":
        return LoRASpace(base, tune, seed=seed)
    if tune.weights and decays:
        raise ValueError(
            "local.weight_decay must be 0 where tune.space is seeds and tune.weights names some:"
            " it shrinks all weights alike"
        )
    noise = derive(seed, "directions")
    drawn = partial(Directions, law=tune.law, seed=noise, rank=tune.law_rank)
    return SeedSpace(base, drawn, tune.num_seeds, names=tune.weights, decays=decays)


def _check_quantized(tune: TuneSettings) -> None:
    if tune.space == "full" or tune.dora or (tune.space == "seeds" and tune.law != "lowrank"):
        raise ValueError(
            "model.quantize int8 needs tune.space lora without dora, or seeds with tune.law lowrank,"
            f" got {tune.space} with {'dora' if tune.dora else tune.law}"
        )
