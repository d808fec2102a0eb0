"""What all rules that compare whole updates have in common: who is compared, how, and what is told of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedloom.core.payloads import NoReplies
from fedloom.core.protocols import Metrics, Params, Reply, Sees
from fedloom.server.combine.products import inner_products, pairs, settled

INFLUENCE = "influence/"
"""Before a client's name in what a rule tells: its part in the update, 1 as it weighs, 0 where it was rejected."""


class TooFew(NoReplies):
    """Fewer replies than a rule promises anything for: the round is not kept."""

    def __init__(self, rule: str, needed: int, found: int) -> None:
        """Say which rule, how many replies it needs and how many there were."""
        super().__init__(f"{rule} needs at least {needed} replies, got {found}")
        self.needed = needed


@dataclass(frozen=True)
class Updates:
    """What clients sent, in the order of their ids."""

    start: Params
    sent: Sequence[Params]
    weights: Sequence[float]

    @property
    def deltas(self) -> list[Params]:
        """Return what may be added up: LoRA's factors in the gauge of the start."""
        return [settled(self.start, delta) for delta in self.sent]

    @property
    def products(self) -> Tensor:
        """Return their inner products as changes of the model, (n, n) float64."""
        return inner_products(self.start, self.sent)


class Robust(Protocol):
    """A rule that a few bad clients cannot bend; subclasses say how many replies it takes, and what comes of them."""

    @property
    def sees(self) -> Sees:
        """Return what of the uploads it reads: every one, whole."""
        return "each in full"

    @property
    def rule(self) -> str:
        """Return what recipes call it."""
        ...

    @property
    def least(self) -> int:
        """Return the replies without which it combines nothing."""
        ...

    def of(self, arrived: "Updates") -> tuple[Params, list[float]]:
        """Return the combined update, and every client's influence."""
        ...

    def begin(self, params: Params) -> None:
        """Refuse factors whose product is not known."""
        factors = [params[a] for a, _ in pairs(params)]
        if factors and not any(bool(t.any()) for t in factors):
            raise ValueError(
                f"combine: {self.rule} compares clients by the products of LoRA's factors, which needs"
                " tune.lora.origin zero, or freeze around it, got coordinates that count from where A began"
            )

    def combine(self, params: Params, replies: Iterable[Reply]) -> tuple[Params, Metrics]:
        """Return the combined update; who has no weight has no vote."""
        arrived = sorted((r for r in replies if r.weight), key=lambda reply: reply.client)
        if len(arrived) < self.least:
            raise TooFew(self.rule, self.least, len(arrived))
        sent = [reply.upload["delta"] for reply in arrived]
        delta, influence = self.of(Updates(params, sent, [reply.weight for reply in arrived]))
        pairs = zip(arrived, influence, strict=True)
        return delta, {f"{INFLUENCE}{reply.client}": part for reply, part in pairs}
