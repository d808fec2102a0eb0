"""Local training only: the baseline in which nothing is shared.

OpenFedLLM: Training Large Language Models on Decentralized Private Data via Federated Learning. Ye,
Wang, Chai, Li, Li, Xu, Du, Wang, Chen, KDD 2024 (arXiv:2402.06954), the "local" baseline.

Deviation: every client of the cohort trains a model of its own, where the reference code trains one
chosen client.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

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
class LocalState:
    """What everybody starts from."""

    params: Params


@dataclass(frozen=True, slots=True)
class LocalOnly:
    """Clients go on with their own model and send nothing back."""

    server_sees: ClassVar[Sees] = "mean"

    def init(self, params: Params, seed: int) -> LocalState:
        return LocalState(params)

    def broadcast(self, state: LocalState, round: Round) -> Mapping[ClientId, Payload]:
        return to_all(round, {"params": state.params})

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        done = yield Fit(self.deployed(task.download, client_state))
        new_state = {"personal": done.params}
        return Reply(task.client, {}, done.num_examples, done.metrics), new_state

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return client_state.get("personal", download["params"])

    def server_update(
        self, state: LocalState, round: Round, replies: Iterable[Reply]
    ) -> tuple[LocalState, Metrics]:
        mean_upload(replies)  # empty; a round in which nobody trained is a skipped one here too
        return state, {}
