"""How a server makes one update of many: their mean, or a rule that a few bad clients cannot bend.

A rule is a pure function of the replies, whatever their order: clients are taken by id, and so are ties. All but the mean
compare LoRA's factors by what they do to the model, their product, and take no fewer replies than they need to keep what
they promise.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from fedloom.core.payloads import mean_upload
from fedloom.core.protocols import Metrics, Params, Reply, Sees
from fedloom.server.combine.bounded import CentredClip, GeometricMedian, NormBound
from fedloom.server.combine.chosen import Bulyan, Krum, MultiKrum
from fedloom.server.combine.sorted import Median, TrimmedMean


class Combine(Protocol):
    """Makes one update of many; a pure function of its arguments."""

    @property
    def sees(self) -> Sees:
        """Return what of the uploads it reads."""
        ...

    @property
    def rule(self) -> str:
        """Return what recipes call it."""
        ...

    @property
    def least(self) -> int:
        """Return the replies without which it combines nothing."""
        ...

    def begin(self, params: Params) -> None:
        """Refuse a space in which it cannot compare updates."""
        ...

    def combine(self, params: Params, replies: Iterable[Reply]) -> tuple[Params, Metrics]:
        """Return the combined `delta` of clients that began at `params`, and the influence of each where it differs.

        Raises:
            NoReplies: where there are too few.
        """
        ...


@dataclass(frozen=True, slots=True)
class Mean:
    """The weighted mean, in one pass: memory does not grow with the cohort."""

    @property
    def sees(self) -> Sees:
        return "mean"

    @property
    def rule(self) -> str:
        return "mean"

    @property
    def least(self) -> int:
        return 1

    def begin(self, params: Params) -> None:
        """Take any space."""

    def combine(self, params: Params, replies: Iterable[Reply]) -> tuple[Params, Metrics]:
        """Return the mean."""
        return mean_upload(replies)["delta"], {}


COMBINES: dict[str, type[Combine]] = {
    "mean": Mean,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "bulyan": Bulyan,
    "geometric_median": GeometricMedian,
    "centred_clip": CentredClip,
    "norm_bound": NormBound,
}


def check_quorum(rule: Combine, most: int | None) -> None:
    """Refuse a rule that would never have enough replies.

    Args:
        rule: Of the algorithm.
        most: The clients of the largest cohort; None where that is not known yet.

    Raises:
        ValueError: where the largest cohort is smaller than the rule's least.
    """
    if most is not None and rule.least > most:
        raise ValueError(
            f"combine: {rule.rule} needs at least {rule.least} replies a round, got a cohort of at most {most}:"
            " ask more clients, expect fewer attackers, or take another rule"
        )
