"""Rules that hear everybody, and nobody beyond a distance.

Robust Aggregation for Federated Learning. Pillutla, Kakade, Harchaoui, IEEE Transactions on Signal Processing 2022
(arXiv:1912.13445): the geometric median by smoothed Weiszfeld steps, run until they settle where the paper takes few.

Learning from MetricsLog for Byzantine Robust Optimization. Karimireddy, He, Jaggi, ICML 2021 (arXiv:2012.10333): centred
clipping. Every round begins at no change, where the paper begins at the last round's update, so that what comes of a
round follows from its replies; clients keep no momentum.

FLAME: Taming Backdoors in Federated Learning. Nguyen et al., USENIX Security 2022 (arXiv:2101.02281): a bound that is
the median of the round's norms. Updates shrink by several times over a run, by learning rates that fall and by
what is left to learn, which no number given before follows. The radius of centred clipping is found likewise (ours).

Distances are those of updates as they act on the model; clients count by their weight.
"""

from dataclasses import dataclass

from fedloom.core.protocols import Params
from fedloom.server.combine.robust import Robust, Updates
from fedloom.server.combine.weights import (
    centred_clip,
    geometric_median,
    in_mean,
    relative,
    summed,
    within,
)


@dataclass(frozen=True, slots=True)
class GeometricMedian(Robust):
    """The point with the least sum of distances to all updates; holds while less than half of the weight is bad."""

    @property
    def rule(self) -> str:
        return "geometric_median"

    @property
    def least(self) -> int:
        return 3

    def of(self, arrived: Updates) -> tuple[Params, list[float]]:
        shares = geometric_median(arrived.products, arrived.weights).tolist()
        return summed(arrived.deltas, shares), relative(shares, in_mean(arrived.weights))


@dataclass(frozen=True, slots=True)
class CentredClip(Robust):
    """The mean of updates, each clipped around what the iteration before came to."""

    radius: float | None = None
    """How far an update may pull: a norm, of a change of the model. None: the median of the updates' distances, each time."""
    iterations: int = 3
    """Clipped means one after another, the first around no change."""

    def __post_init__(self) -> None:
        _check("centred_clip.radius", self.radius)
        if self.iterations < 1:
            raise ValueError(
                f"combine.centred_clip.iterations must be at least 1, got {self.iterations}"
            )

    @property
    def rule(self) -> str:
        return "centred_clip"

    @property
    def least(self) -> int:
        return 3 if self.radius is None else 1

    def of(self, arrived: Updates) -> tuple[Params, list[float]]:
        products = arrived.products
        clipped = centred_clip(
            products, arrived.weights, radius=self.radius, iterations=self.iterations
        )
        shares = clipped.tolist()
        return summed(arrived.deltas, shares), relative(shares, in_mean(arrived.weights))


@dataclass(frozen=True, slots=True)
class NormBound(Robust):
    """The mean of updates, each scaled down to a largest norm."""

    bound: float | None = None
    """Largest norm of a client's change of the model. None: the median of the round's."""

    def __post_init__(self) -> None:
        _check("norm_bound.bound", self.bound)

    @property
    def rule(self) -> str:
        return "norm_bound"

    @property
    def least(self) -> int:
        return 3 if self.bound is None else 1

    def of(self, arrived: Updates) -> tuple[Params, list[float]]:
        lengths = arrived.products.diagonal().clamp_min(0).sqrt()
        factors = within(lengths, self.bound).tolist()
        shares = [part * own for part, own in zip(factors, in_mean(arrived.weights), strict=True)]
        return summed(arrived.deltas, shares), factors


def _check(setting: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"combine.{setting} must be a positive number, got {value}")
