"""Vectors that scale what layers of a frozen base model give and take: the kinds ia3 and vera."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedloom.models.adapters import attach_ia3, attach_vera
from fedloom.models.build import Base
from fedloom.spaces.adapter import AdapterSpace


@dataclass(frozen=True, slots=True)
class IA3:
    """Learn a factor for every number that some layers give, or take.

    Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning. Liu, Tam, Muqeeth, Mohta, Huang,
    Bansal, Raffel, NeurIPS 2022 (arXiv:2205.05638). Coordinates count from 1, where a factor does nothing.
    """

    targets: str | Sequence[str] = "auto"
    """Linear layers, by the end of their name; auto: PEFT's choice for the architecture, keys, values and the last of the
    MLP."""
    feedforward: Sequence[str] = ()
    """Those of `targets` whose input is scaled, not their output; auto has its own."""

    is_adapter: ClassVar[bool] = True
    is_seed_space: ClassVar[bool] = False
    virtual_tokens: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if isinstance(self.targets, str) and self.targets not in ("auto", "all-linear"):
            raise ValueError(
                f"tune.ia3.targets must be auto, all-linear or a list of layers, got {self.targets}"
            )
        if not self.targets:
            raise ValueError("tune.ia3.targets must be auto or name linear layers, got none")
        if isinstance(self.feedforward, str):
            raise ValueError(f"tune.ia3.feedforward must be a list, got {self.feedforward}")
        strange = sorted(set(self.feedforward) - set(self.targets))
        if self.targets == "auto" and self.feedforward:
            raise ValueError(
                "tune.ia3.feedforward has no effect where tune.ia3.targets is auto, which has its own; name the"
                " targets"
            )
        if strange and self.targets != "all-linear":
            raise ValueError(
                f"tune.ia3.feedforward must be among tune.ia3.targets ({', '.join(self.targets)}), got"
                f" {strange[0]}"
            )

    @property
    def title(self) -> str:
        return "ia3"

    def make_space(self, base: Base, *, seed: int, decays: bool = False) -> AdapterSpace:
        adapter = attach_ia3(
            base.model,
            targets=self.targets,
            feedforward=self.feedforward,
            seed=seed,
            base_name=base.name,
        )
        return AdapterSpace(base, adapter)


@dataclass(frozen=True, slots=True)
class VeRA:
    """Learn two vectors a layer around random projections that all layers share and nobody sends.

    VeRA: Vector-based Random Matrix Adaptation. Kopiczko, Blankevoort, Asano, ICLR 2024 (arXiv:2310.11454), equation 2. Both
    sides draw the projections from the run's seed and compare their hashes before the first round.
    """

    rank: int = 256
    """Of the projections; beyond a layer's size too, since only vectors of it are learnt."""
    targets: str | Sequence[str] = "all-linear"
    """Linear layers, by the end of their name. They share projections of the largest size, and use a part of it each."""
    d_initial: float = 0.1
    """What the inner vector starts at; the outer one starts at 0, and the model at the base model."""

    is_adapter: ClassVar[bool] = True
    is_seed_space: ClassVar[bool] = False
    virtual_tokens: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.rank < 1:
            raise ValueError(f"tune.vera.rank must be at least 1, got {self.rank}")
        if not self.targets:
            raise ValueError("tune.vera.targets must be all-linear or name linear layers, got none")
        if not self.d_initial > 0:
            raise ValueError(
                f"tune.vera.d_initial must be positive, got {self.d_initial}: at 0 nothing would learn"
            )

    @property
    def title(self) -> str:
        return f"vera, rank {self.rank}"

    def make_space(self, base: Base, *, seed: int, decays: bool = False) -> AdapterSpace:
        adapter = attach_vera(
            base.model,
            rank=self.rank,
            targets=self.targets,
            d_initial=self.d_initial,
            seed=seed,
            base_name=base.name,
        )
        return AdapterSpace(base, adapter)
