"""pFedMe: personal models by Moreau envelopes.

Personalized Federated Learning with Moreau Envelopes. Dinh, Tran, Nguyen, NeurIPS 2020
(arXiv:2006.08848), Algorithm 1, eq. 3 and 7.

Deviations: the inner problem is solved by the recipe's `local` steps, each on a fresh batch, where
the paper takes K steps on one batch. It begins at the client's last personal model (in its first
round at the download), which is kept and is what the client uses. Only the cohort trains, where the
paper lets everybody train and averages a sample. The code of FederatedScope-LLM (arXiv:2309.00363)
moves the local copy once an epoch and forgets the personal model; here the copy moves after every
inner solve.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from fedloom.core.description import Description, RecipeView
from fedloom.core.params import axpy, sub
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


@dataclass(frozen=True)
class PFedMeState:
    """The shared model w."""

    params: Params


@dataclass(frozen=True, slots=True)
class PFedMe:
    """Clients pull a personal model towards theirs and theirs towards it, several times a round."""

    strength: float = 15.0
    """lambda: how close a personal model stays to the local copy of the shared one."""
    lr: float = 0.005
    """eta: the local copy moves lr * strength of the way to the personal model."""
    local_rounds: int = 5
    """R: inner solves a round, each of the recipe's `local` steps."""
    server_mix: float = 1.0
    """beta: how far the shared model goes to the mean of the local copies; above 1 is past it."""
    combine: Combine = Mean()
    """How one delta is made of many: their mean, or a rule that bad clients cannot bend."""

    def __post_init__(self) -> None:
        positive = {"strength": self.strength, "lr": self.lr, "server_mix": self.server_mix}
        for name, value in positive.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"pfedme.{name} must be a positive number, got {value}")
        if self.local_rounds < 1:
            raise ValueError(f"pfedme.local_rounds must be at least 1, got {self.local_rounds}")

    @property
    def server_sees(self) -> Sees:
        return self.combine.sees

    def describe(self, state: object) -> Description:
        averages = self.combine.sees == "mean"
        why = "" if averages else "a robust rule compares updates that begin at one model"
        return Description(min_replies=self.combine.least, averages_deltas=averages, current=why)

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Self:
        check_quorum(self.combine, recipe.cohort.largest(num_clients))
        return self

    def init(self, params: Params, seed: int) -> PFedMeState:
        self.combine.begin(params)
        return PFedMeState(params)

    def broadcast(self, state: PFedMeState, round: Round) -> Mapping[ClientId, Payload]:
        return to_all(round, {"params": state.params})

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        start = local = task.download["params"]
        personal = client_state.get("personal", start)
        for _ in range(self.local_rounds):
            done = yield Fit(personal, proximal=Proximal(self.strength, local))  # eq. 7
            personal = done.params
            local = axpy(self.lr * self.strength, sub(personal, local), local)  # line 8
        upload = {"delta": sub(local, start)}
        return Reply(task.client, upload, metrics=done.metrics), {"personal": personal}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return client_state.get("personal", download["params"])

    def server_update(
        self, state: PFedMeState, round: Round, replies: Iterable[Reply]
    ) -> tuple[PFedMeState, Metrics]:
        # (1 - beta) w + beta mean(w_i)
        delta, metrics = self.combine.combine(state.params, replies)
        return PFedMeState(axpy(self.server_mix, delta, state.params)), metrics
