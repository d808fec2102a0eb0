"""How likely a seed is drawn, from the scalars that were met along it.

Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18
Kilobytes. Qin, Chen, Qian, Ding, Li, Deng, ICML 2024 (arXiv:2312.06353): Pro.

Pro's chances differ by a factor of e and no more, whatever the scalars: the softmax is of numbers
between 0 and 1. Power's follow the sizes themselves, held off zero by a uniform share.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class SeedSampling(Protocol):
    """Turns what is known of K seeds into chances; a pure function of its arguments."""

    @property
    def clip(self) -> float:
        """Return the largest |scalar| that counts."""
        ...

    @property
    def corrected(self) -> bool:
        """Return whether a step along seed k counts 1 / (K p_k)."""
        ...

    def chances(self, sizes: Tensor, draws: Tensor) -> Tensor | None:
        """Return (K,) float64 that sum to 1, from the sum of |scalar| and the number of draws of each seed.

        None where all are alike whatever happens: then nobody has to be told.
        """
        ...


@dataclass(frozen=True, slots=True)
class Alike:
    """FedKSeed: every seed alike, so that a client knows its walk from its task's seed."""

    @property
    def clip(self) -> float:
        return math.inf

    @property
    def corrected(self) -> bool:
        return False

    def chances(self, sizes: Tensor, draws: Tensor) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Pro:
    """FedKSeed-Pro: the softmax of mean |scalar| scaled to [0, 1]."""

    clip: float = 1000.0
    """Largest |scalar| that counts."""
    corrected: bool = False
    """Weigh a step along seed k by 1 / (K p_k), so that the expected step is that of uniform draws."""

    def __post_init__(self) -> None:
        _check_clip("pro", self.clip)

    def chances(self, sizes: Tensor, draws: Tensor) -> Tensor:
        # The paper's code begins every history with a zero, which stays in the mean.
        mean = sizes / (draws + 1)
        least, most = mean.min(), mean.max()
        return torch.softmax((mean - least) / (most + 1e-10 - least), dim=0)


@dataclass(frozen=True, slots=True)
class Power:
    """Chances proportional to a power of mean |scalar|, mixed with uniform ones; not of the paper."""

    power: float = 1.0
    """0 draws uniformly; the larger, the more often the largest."""
    mix: float = 0.1
    """Share of the draws that are uniform, (0, 1]."""
    clip: float = 1000.0
    """Largest |scalar| that counts."""
    corrected: bool = False
    """Weigh a step along seed k by 1 / (K p_k), so that the expected step is that of uniform draws."""

    def __post_init__(self) -> None:
        _check_clip("power", self.clip)
        if not 0 <= self.power < math.inf:
            raise ValueError(f"sampling.power.power must be a number >= 0, got {self.power}")
        if not 0 < self.mix <= 1:
            raise ValueError(f"sampling.power.mix must be in (0, 1], got {self.mix}")

    def chances(self, sizes: Tensor, draws: Tensor) -> Tensor:
        seen = draws > 0
        mean = sizes / draws.clamp(min=1)
        # A seed nobody has walked along yet counts as an average one.
        known = torch.where(seen, mean, mean[seen].mean() if bool(seen.any()) else 1.0)
        top = known.max()
        weights = (known / top) ** self.power if top > 0 else torch.ones_like(known)
        return (1 - self.mix) * weights / weights.sum() + self.mix / len(weights)


SEED_SAMPLINGS: dict[str, type[SeedSampling]] = {"uniform": Alike, "pro": Pro, "power": Power}


def _check_clip(name: str, clip: float) -> None:
    if not clip > 0:
        raise ValueError(f"sampling.{name}.clip must be positive, got {clip}")
