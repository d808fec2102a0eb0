"""FedAvg, with any server optimizer (FedOpt), and FedProx.

Communication-Efficient Learning of Deep Networks from Decentralized Data. McMahan, Moore, Ramage,
Hampson, Agüera y Arcas, AISTATS 2017 (arXiv:1602.05629), Algorithm 1.

Adaptive Federated Optimization. Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan,
ICLR 2021 (arXiv:2003.00295), Algorithms 1 and 2: `server`.

Federated Optimization in Heterogeneous Networks. Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, MLSys
2020 (arXiv:1812.06127), Algorithm 2, eq. 2: `mu`.

Deviations: `weighting: examples` weighs a client by its number of training examples, as McMahan et
al. do; Algorithm 2 of Reddi et al. and the code of OpenFedLLM (arXiv:2402.06954) feed adaptive
optimizers the plain mean, `weighting: uniform`. FedProx takes the recipe's local steps where Li et
al. let each client stop at its own inexactness, draws clients as the recipe says where they draw by
size, and its pull goes through whatever local optimizer is chosen.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Self

from fedloom.core.description import Description, RecipeView
from fedloom.core.params import sub
from fedloom.core.payloads import to_all
from fedloom.core.protocols import (
    ClientId,
    ClientUpdate,
    Fit,
    Metrics,
    Params,
    Payload,
    Proximal,
    Reply,
    Round,
    Sees,
    Task,
)
from fedloom.server.combine import Combine, Mean, check_quorum
from fedloom.server.optimizers import SGD, Moments, ServerOptimizer, rescales


@dataclass(frozen=True)
class FedAvgState:
    """The shared model and what its optimizer remembers."""

    params: Params
    moments: Moments


@dataclass(frozen=True, slots=True)
class FedAvg:
    """Clients train from the shared model; the server steps along the mean of their deltas."""

    server: ServerOptimizer = SGD()
    """How the server steps along the mean delta."""
    mu: float = 0.0
    """Strength of FedProx's pull towards the download; 0 is FedAvg."""
    weighting: Literal["examples", "uniform"] = "examples"
    """Whether clients count by their training examples or alike; rules that choose or sort count them alike."""
    combine: Combine = Mean()
    """How one delta is made of many: their mean, or a rule that bad clients cannot bend."""

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise ValueError(f"fedavg.mu must be >= 0, got {self.mu}")
        if self.weighting not in ("examples", "uniform"):
            raise ValueError(
                f"fedavg.weighting must be examples or uniform, got {self.weighting!r}"
            )

    @property
    def server_sees(self) -> Sees:
        return self.combine.sees

    def describe(self, state: object) -> Description:
        averages = self.combine.sees == "mean"
        why = "" if averages else "a robust rule compares updates that begin at one model"
        return Description(
            min_replies=self.combine.least,
            averages_deltas=averages,
            rescales=rescales(self.server),
            current=why,
        )

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Self:
        check_quorum(self.combine, recipe.cohort.largest(num_clients))
        return self

    def init(self, params: Params, seed: int) -> FedAvgState:
        self.combine.begin(params)
        return FedAvgState(params, self.server.init(params))

    def broadcast(self, state: FedAvgState, round: Round) -> Mapping[ClientId, Payload]:
        return to_all(round, {"params": state.params})

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        start = task.download["params"]
        done = yield Fit(start, proximal=Proximal(self.mu, start) if self.mu else None)
        weight = done.num_examples if self.weighting == "examples" else 1.0
        return Reply(task.client, {"delta": sub(done.params, start)}, weight, done.metrics), {}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return download["params"]

    def server_update(
        self, state: FedAvgState, round: Round, replies: Iterable[Reply]
    ) -> tuple[FedAvgState, Metrics]:
        delta, metrics = self.combine.combine(state.params, replies)
        params, moments = self.server.step(state.params, delta, state.moments)
        return FedAvgState(params, moments), metrics
