"""Ditto: a personal model beside any algorithm, pulled towards the shared one.

Ditto: Fair and Robust Federated Learning Through Personalization. Li, Hu, Beirami, Smith, ICML 2021
(arXiv:2012.04221), Algorithm 1.

Deviations: a personal model begins at the shared model of its client's first round, not of round 1,
and its pull goes through whatever local optimizer is chosen. The code of FederatedScope-LLM
(arXiv:2309.00363) copies the whole model twice a client; here a personal model is one more set of
the tuned coordinates, kept in the client's client_state.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from fedloom.core.description import Description, mask_of
from fedloom.core.protocols import (
    Algorithm,
    ClientId,
    ClientUpdate,
    Fit,
    Metrics,
    Params,
    Payload,
    Proximal,
    Reply,
    Round,
    State,
    Task,
)
from fedloom.core.wrapper import Wrapper


@dataclass(frozen=True, slots=True)
class Ditto(Wrapper[State]):
    """What is sent is the inner algorithm's; what a client uses is its personal model."""

    inner: Algorithm[State]
    """Trains the shared model."""
    strength: float = 0.1
    """lambda: pull of the shared model; 0 is local training. `partial_pooling` needs none, and estimates what it stands for."""
    steps: int | None = None
    """Optimizer steps on the personal model a round; None: as many as `local` says."""

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"ditto.strength must be >= 0, got {self.strength}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"ditto.steps must be at least 1 or left out, got {self.steps}")

    def describe(self, state: State | None) -> Description:
        # Personal models train as `local` says, whatever is inside.
        return replace(Wrapper.describe(self, state), steps="")

    def init(self, params: Params, seed: int) -> State:
        return self.inner.init(params, seed)

    def broadcast(self, state: State, round: Round) -> Mapping[ClientId, Payload]:
        return self.inner.broadcast(state, round)

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        reply, new_state = yield from self.inner.client_update(task, client_state)
        shared = self.inner.deployed(task.download, client_state)
        start, mask = client_state.get("ditto", shared), mask_of(self.inner, task.download)
        if mask:
            # What only the server writes, such as fedlora's frozen pair, is the server's here too.
            start = {n: torch.where(mask[n].bool(), t, shared[n]) for n, t in start.items()}
        pull = Proximal(self.strength, shared) if self.strength else None
        done = yield Fit(start, proximal=pull, mask=mask, steps=self.steps)
        personal = {f"personal/{name}": value for name, value in done.metrics.items()}
        reply = replace(reply, metrics={**reply.metrics, **personal})
        return reply, {**new_state, "ditto": done.params}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return (
            client_state["ditto"]
            if "ditto" in client_state
            else self.inner.deployed(download, client_state)
        )

    def server_update(
        self, state: State, round: Round, replies: Iterable[Reply]
    ) -> tuple[State, Metrics]:
        return self.inner.server_update(state, round, replies)
