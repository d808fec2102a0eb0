"""A method of one's own in forty lines: FedExP, examined by the laws and run on the bundled model.

FedExP: Speeding Up Federated Averaging via Extrapolation. Jhunjhunwala, Wang, Joshi, ICLR 2023 (arXiv:2301.09604), eq. 5: the
server goes along the mean delta by max(1, mean of the squared norms / (2 (squared norm of the mean + eps))).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

import fedloom
from fedloom.core.params import axpy, norm, sub
from fedloom.core.payloads import mean_upload, to_all
from fedloom.core.protocols import ClientUpdate, Metrics, Params, Payload, Sees
from fedloom.testing import check_algorithm


@dataclass(frozen=True)
class FedExPState:
    """All that the server keeps."""

    params: Params


@dataclass(frozen=True)
class FedExP:
    """FedAvg whose server goes further where clients pull in different directions."""

    eps: float = 1e-3
    server_sees: ClassVar[Sees] = "mean"

    def init(self, params: Params, seed: int) -> FedExPState:
        return FedExPState(params)

    def broadcast(self, state: FedExPState, round: fedloom.Round) -> Mapping[str, Payload]:
        return to_all(round, {"params": state.params})

    def client_update(self, task: fedloom.Task, client_state: Payload) -> ClientUpdate:
        start = task.download["params"]
        done = yield fedloom.Fit(start)
        delta = sub(done.params, start)
        # Its own squared norm travels beside it, so that a mean is all that the server reads.
        square = {"square": torch.tensor([norm({"delta": delta}) ** 2])}
        return fedloom.Reply(task.client, {"delta": delta, "norm": square}, 1.0, done.metrics), {}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return download["params"]

    def server_update(
        self, state: FedExPState, round: fedloom.Round, replies: Iterable[fedloom.Reply]
    ) -> tuple[FedExPState, Metrics]:
        mean = mean_upload(replies)
        squares, square = float(mean["norm"]["square"]), norm({"delta": mean["delta"]}) ** 2
        step = max(1.0, squares / (2 * (square + self.eps)))
        return FedExPState(axpy(step, mean["delta"], state.params)), {"server_step": step}


def main() -> None:
    """Examine the method, then run it on the bundled model with clients of unlike tasks."""
    print("laws that hold:", ", ".join(check_algorithm(FedExP()).passed))
    overrides = ["run.rounds=3", "run.baselines=[fedavg]", "data.num_examples=600", "local.steps=6"]
    overrides += ["evaluation={every: 0, generate: false}"]
    result = fedloom.run("quickstart", algorithm=FedExP(), overrides=overrides)
    print("server steps", [row["server/server_step"] for row in result.metrics if row["round"]])
    for name, one in {"FedExP": result, **result.baselines}.items():
        print(f"{name:8} test loss {one.summary['final']['test/loss']:.3f}")


if __name__ == "__main__":
    main()
