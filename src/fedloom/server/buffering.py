"""When the server steps: once a whole cohort has answered, or once so many answers are there, some of older models.

FedBuff: Federated Learning with Buffered Asynchronous Aggregation. Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba,
AISTATS 2022 (arXiv:2106.06639), Algorithm 1: w += eta / K sum_i s(tau_i) delta_i, with s(tau) = 1 / sqrt(1 + tau).

FedAsync: Asynchronous Federated Optimization. Xie, Koyejo, Gupta 2019 (arXiv:1903.03934), Algorithm 1 and section 5.2:
w = (1 - alpha s) w + alpha s w_i, one answer a step, `mixes: models`; s polynomial or hinge, alpha the lr of the server's
`sgd`, its pull towards what was sent `fedavg.mu`.

Deviations: where clients weigh by their examples, the mean over the buffer is FedAvg's, of s(tau_i) delta_i; the papers'
is plain, `weighting: uniform`. As in FedBuff, s is not normalised: old answers move the model less. Staleness is the number of steps that
the server took since a client was sent the model, 0 for none, so that FedAsync's first weight is alpha; the paper counts from 1.
A client is not sent the next model before its own answer was taken up, so that nobody is in a buffer twice. Answers come in
the order of an event clock (`rounds.buffered`), over sites in that of their arrival (`rounds.buffered_sites`).
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from fedloom.core.params import axpy, params_map, sub
from fedloom.core.protocols import Params


class Staleness(Protocol):
    """How much an answer counts that begins at an older model."""

    def weight(self, staleness: int) -> float:
        """Return what an update is multiplied by, (0, 1].

        Args:
            staleness: Steps that the server took since the client was sent the model.
        """
        ...


@dataclass(frozen=True, slots=True)
class Polynomial:
    """(1 + tau)^-power: 1, 0.7071, 0.5774, 0.5, ... with a half, as in FedBuff and FedAsync."""

    power: float = 0.5
    """How fast it falls."""

    def __post_init__(self) -> None:
        if not 0 < self.power < float("inf"):
            raise ValueError(
                f"staleness.polynomial.power must be a positive number, got {self.power}"
            )

    def weight(self, staleness: int) -> float:
        return float((1 + staleness) ** -self.power)


@dataclass(frozen=True, slots=True)
class Hinge:
    """1 up to `after`, then 1 / (slope (tau - after) + 1): FedAsync's other choice."""

    slope: float = 10.0
    """a of the paper."""
    after: int = 4
    """b of the paper."""

    def __post_init__(self) -> None:
        if not 0 < self.slope < float("inf"):
            raise ValueError(f"staleness.hinge.slope must be a positive number, got {self.slope}")
        if self.after < 0:
            raise ValueError(f"staleness.hinge.after must be at least 0, got {self.after}")

    def weight(self, staleness: int) -> float:
        return 1 / (self.slope * max(staleness - self.after, 0) + 1)


@dataclass(frozen=True, slots=True)
class Constant:
    """1, however old."""

    def weight(self, staleness: int) -> float:
        return 1.0


STALENESS: dict[str, type[Staleness]] = {
    "polynomial": Polynomial,
    "hinge": Hinge,
    "constant": Constant,
}


@dataclass(frozen=True, slots=True)
class Synchronous:
    """The server waits for the whole cohort."""


@dataclass(frozen=True, slots=True)
class Buffered:
    """The server steps once so many clients answered; those of `cohort` train all the while, each from the model it was sent."""

    size: int = 10
    """K: answers of one step, which is what a round is."""
    staleness: Staleness = Polynomial()
    """How much an answer to an older model counts."""
    max_staleness: int | None = None
    """An answer whose model is more steps old is dropped; None: none is."""
    mixes: Literal["updates", "models"] = "updates"
    """What of a client goes into the model: what it learnt (FedBuff), or its whole model (FedAsync)."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"run.mode.buffered.size must be at least 1, got {self.size}")
        if self.max_staleness is not None and self.max_staleness < 0:
            raise ValueError(
                f"run.mode.buffered.max_staleness must be at least 0 or null, got {self.max_staleness}"
            )
        if self.mixes not in ("updates", "models"):
            raise ValueError(
                f"run.mode.buffered.mixes must be updates or models, got {self.mixes!r}"
            )

    def takes(self, staleness: int) -> bool:
        """Return whether an answer is not too old."""
        return self.max_staleness is None or staleness <= self.max_staleness

    def aged(self, delta: Params, staleness: int, *, began: Params, now: Params) -> Params:
        """Return what an answer moves the model by.

        Args:
            delta: What the client learnt.
            staleness: How old the model is that it began at.
            began: The params it was sent; read where whole models are mixed.
            now: Those it would be sent now.
        """
        if self.mixes == "models" and staleness:
            delta = sub(axpy(1.0, delta, began), now)
        weight = self.staleness.weight(staleness)
        return delta if weight == 1 else params_map(lambda tensor: weight * tensor, delta)


RunMode = Synchronous | Buffered
RUN_MODES: dict[str, type[RunMode]] = {"synchronous": Synchronous, "buffered": Buffered}
