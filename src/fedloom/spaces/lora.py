"""Low-rank adapters on a frozen base model.

LoRA: Low-Rank Adaptation of Large Language Models. Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, ICLR 2022
(arXiv:2106.09685), through PEFT. Params are the tensors that train, not what PEFT would save of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from fedloom.core.ranks import Ranks
from fedloom.models.adapters import Adapter, attach_lora
from fedloom.models.build import Base
from fedloom.models.quantized import check_unquantized, scheme_of
from fedloom.spaces.adapter import AdapterSpace
from fedloom.spaces.live import Origin, check_names, check_origin


def scale(alpha: float, rank: int, *, rslora: bool) -> float:
    """Return what the product B A is multiplied by: alpha / rank, or alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


@dataclass(frozen=True, slots=True)
class LoRA:
    """Learn low-rank adapters, and modules beside them."""

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
    init: Literal["kaiming", "pissa"] = "kaiming"
    """What A and B start as: noise and zeros, or the largest singular directions of each weight, which keeps the rest (PiSSA,
    Meng et al. 2024, arXiv:2404.02948)."""
    targets: str | Sequence[str] = "all-linear"
    """Linear layers that get an adapter, by the end of their name."""
    modules_to_save: Sequence[str] = ()
    """Modules that are tuned whole beside the adapters."""
    origin: Origin = "initial"
    """Where coordinates count from: the start everybody shares, or nothing."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Smaller ranks of clients, by the `tier` of their profile; each has alpha over its own rank as its scale."""
    side: int = 0
    """Rank of a frozen pair of factors beside the adapter, for sums that an adapter of `rank` cannot hold."""

    is_adapter: ClassVar[bool] = True
    is_seed_space: ClassVar[bool] = False
    virtual_tokens: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.rank < 1:
            raise ValueError(f"tune.lora.rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"tune.lora.alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"tune.lora.dropout must be in [0, 1), got {self.dropout}")
        if self.init not in ("kaiming", "pissa"):
            raise ValueError(f"tune.lora.init must be kaiming or pissa, got {self.init}")
        if self.init == "pissa" and self.dora:
            raise ValueError(
                "tune.lora.dora must be false where tune.lora.init is pissa: magnitudes are those of whole weights"
            )
        if not self.targets:
            raise ValueError("tune.lora.targets must be all-linear or name linear layers, got none")
        for tier, rank in self.ranks.items():
            if not 1 <= rank <= self.rank:
                raise ValueError(
                    f"tune.lora.ranks.{tier} must be from 1 to tune.lora.rank, which is {self.rank}, got {rank}"
                )
        if self.side < 0:
            raise ValueError(f"tune.lora.side must be at least 0, got {self.side}")
        if self.dora and (self.ranks or self.side):
            which = "ranks" if self.ranks else "side"
            raise ValueError(f"tune.lora.{which} must be left out where tune.lora.dora is true")
        if self.init == "pissa" and (self.ranks or self.side):
            which = "ranks" if self.ranks else "side"
            raise ValueError(
                f"tune.lora.{which} must be left out where tune.lora.init is pissa: without all of its start a model is not"
                " the one given"
            )
        check_names(self.modules_to_save, path="tune.lora.modules_to_save")
        check_origin(self.origin, path="tune.lora.origin")

    @property
    def title(self) -> str:
        return f"lora, rank {self.rank}"

    @property
    def adapters(self) -> Ranks | None:
        """Return how wide clients' adapters are; None with dora, whose magnitudes are no part of a product."""
        if self.dora:
            return None
        widest = scale(self.alpha, self.rank, rslora=self.rslora)
        every = range(1, self.rank + 1)
        gains = {r: scale(self.alpha, r, rslora=self.rslora) / widest for r in every}
        return Ranks(self.rank, self.ranks, self.side, gains)

    def make_space(self, base: Base, *, seed: int, decays: bool = False) -> AdapterSpace:
        adapter = self.attach(base, self.targets, seed=seed)
        return AdapterSpace(base, adapter, origin=self.origin, dropout=self.dropout)

    def attach(self, base: Base, targets: str | Sequence[str], *, seed: int) -> Adapter:
        """Put the adapter on these linear layers of the model, in place."""
        if self.dora:
            check_unquantized(
                base.model,
                "where tune.lora.dora is true, whose magnitudes are those of whole weights",
            )
        whole = base.model.dtype in (torch.float32, torch.float64)
        if self.init == "pissa" and (scheme_of(base.model) or not whole):
            raise ValueError(
                "tune.lora.init pissa takes the largest directions out of the weights, which needs model.dtype float32"
                " and model.quantize none"
            )
        return attach_lora(
            base.model,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rslora=self.rslora,
            dora=self.dora,
            init=self.init,
            targets=targets,
            modules_to_save=self.modules_to_save,
            side=self.side,
            seed=seed,
            base_name=base.name,
        )
