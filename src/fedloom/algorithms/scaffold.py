"""SCAFFOLD: control variates against client drift.

SCAFFOLD: Stochastic Controlled Averaging for Federated Learning. Karimireddy, Kale, Mohri, Reddi,
Stich, Suresh, ICML 2020 (arXiv:1910.06378), Algorithm 1 with option II, eq. 3 to 5.

Deviations: `weighting: examples` weighs deltas and control deltas alike, so that c stays the mean
of the c_i that the weighted objective asks for; the code of OpenFedLLM (arXiv:2402.06954) weighs
the deltas only. That code also takes the displacement of AdamW for a gradient, which is refused
here. c moves by the expected share of clients times the mean of those that replied; a client whose
reply is lost keeps its new c_i. Robust rules (`fedavg.combine`) are not for it: clients that a rule
leaves out go on with the c_i they computed, and c would be the mean of others.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedloom.core.description import Description
from fedloom.core.params import axpy, sub, zeros_like
from fedloom.core.payloads import mean_upload, to_all
from fedloom.core.protocols import (
    ClientId,
    ClientUpdate,
    Fit,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    Sees,
    Task,
)


@dataclass(frozen=True)
class ScaffoldState:
    """The shared model x and the shared control variate c."""

    params: Params
    control: Params


@dataclass(frozen=True, slots=True)
class Scaffold:
    """Every local gradient is corrected by c - c_i; needs `local.optimizer: sgd`."""

    server_sees: ClassVar[Sees] = "mean"

    server_lr: float = 1.0
    """eta_g: how far the server goes along the mean delta."""
    weighting: Literal["examples", "uniform"] = "uniform"
    """Whether clients count by their training examples or alike; the paper's is uniform."""

    def __post_init__(self) -> None:
        if not 0 < self.server_lr < float("inf"):
            raise ValueError(f"scaffold.server_lr must be a positive number, got {self.server_lr}")
        if self.weighting not in ("examples", "uniform"):
            raise ValueError(
                f"scaffold.weighting must be examples or uniform, got {self.weighting!r}"
            )

    def describe(self, state: ScaffoldState | None) -> Description:
        return Description(current="control variates are gradients at the model of the round")

    def init(self, params: Params, seed: int) -> ScaffoldState:
        return ScaffoldState(params, zeros_like(params))

    def broadcast(self, state: ScaffoldState, round: Round) -> Mapping[ClientId, Payload]:
        return to_all(round, {"params": state.params, "control": state.control})

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        start, shared = task.download["params"], task.download["control"]
        own = client_state["control"] if "control" in client_state else zeros_like(shared)
        done = yield Fit(start, gradient_offset=sub(shared, own))
        if done.lr_sum is None:
            raise ValueError(
                "local.optimizer must be sgd without momentum or weight decay for scaffold,"
                " whose control variates are mean gradients, got local training that is not"
            )
        delta = sub(done.params, start)
        # eq. 4, option II: c_i+ = c_i - c - delta / (K eta_l); without a step c_i stays
        new = axpy(-1 / done.lr_sum, delta, sub(own, shared)) if done.lr_sum else own
        weight = done.num_examples if self.weighting == "examples" else 1.0
        upload = {"delta": delta, "control_delta": sub(new, own)}
        return Reply(task.client, upload, weight, done.metrics), {"control": new}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return download["params"]

    def server_update(
        self, state: ScaffoldState, round: Round, replies: Iterable[Reply]
    ) -> tuple[ScaffoldState, Metrics]:
        mean = mean_upload(replies)
        params = axpy(self.server_lr, mean["delta"], state.params)
        # eq. 5: c + |S| / N * mean
        control = axpy(round.rate, mean["control_delta"], state.control)
        return ScaffoldState(params, control), {}
