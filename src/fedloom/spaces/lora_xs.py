"""A small square matrix for every layer, between frozen directions of its weight: what Fed-SB averages without error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedloom.models.build import Base
from fedloom.models.lora_xs import attach_lora_xs
from fedloom.spaces.adapter import AdapterSpace


@dataclass(frozen=True, slots=True)
class LoRAXS:
    """Learn R (rank, rank) in W + alpha / rank B R A, whose B and A are frozen: the mean of R is that of the products.

    LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters. Bałazy, Banaei, Aberer, Tabor 2024
    (arXiv:2405.17604). Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated
    LoRA Fine-Tuning. Singhal, Ponkshe, Vartak, Varshney, Vepakomma 2025 (arXiv:2502.15436). B and A are the singular
    vectors of W's largest values, so that a step of R is as long as that of the weight. Deviations: LoRA-XS has the singular
    values in them too and begins R near zero, here at zero; Fed-SB takes the vectors of a first gradient.
    """

    rank: int = 16
    """Of the square matrices, which have rank times rank numbers each."""
    alpha: float = 16.0
    """The update is alpha / rank times B R A."""
    targets: str | Sequence[str] = "all-linear"
    """Linear layers that get one, by the end of their name."""

    is_adapter: ClassVar[bool] = True
    is_seed_space: ClassVar[bool] = False
    virtual_tokens: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.rank < 1:
            raise ValueError(f"tune.lora_xs.rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"tune.lora_xs.alpha must be positive, got {self.alpha}")
        if not self.targets:
            raise ValueError(
                "tune.lora_xs.targets must be all-linear or name linear layers, got none"
            )

    @property
    def title(self) -> str:
        return f"lora_xs, rank {self.rank}"

    def make_space(self, base: Base, *, seed: int, decays: bool = False) -> AdapterSpace:
        adapter = attach_lora_xs(
            base.model,
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            seed=seed,
            base_name=base.name,
        )
        return AdapterSpace(base, adapter)
