"""Several models for all clients, each client a mixture of them of its own, by any algorithm; components are adapters.

Federated Multi-Task Learning under a Mixture of Distributions (FedEM). Marfoq, Neglia, Bellet, Kameni, Vidal, NeurIPS 2021
(arXiv:2108.10252), Algorithm 1. A client finds each of its examples as likely to be of component m as its share pi_m times the
likelihood of the answer says (equation 9), has the means of that as its new shares (10), and trains every component on all
its examples, each loss multiplied by that chance (11). The server combines each component by itself. A client answers with the
mixture of all components by its shares, which are in its client_state and in no upload.

Deviations: the likelihood is that of all tokens of an answer together, to the power of 1 / temperature. Components begin apart, all
but the first by noise; alike they would stay so. Steps of AdamW are as long where chances are small, which keeps a component that
falls behind from being left there. Answers are written by the component of the largest share, which is what is exported; the
loss is the mixture's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic

import torch
from torch import Tensor

from fedloom.core.description import Description, Mixture, deployed_of, describe
from fedloom.core.numbered import joined, separated
from fedloom.core.params import axpy, params_map
from fedloom.core.payloads import mean_metrics
from fedloom.core.protocols import (
    Algorithm,
    ClientError,
    ClientId,
    ClientUpdate,
    Fit,
    Losses,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    State,
    Task,
)
from fedloom.core.randomness import derive, generator
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.core.wrapper import Wrapper

MOST = 8


@dataclass(frozen=True)
class FedEMState(Generic[State]):
    """The inner state of each component."""

    components: tuple[State, ...]


@dataclass(frozen=True, slots=True)
class FedEM(Wrapper[State]):
    """Trains several models by any algorithm; every example counts in each as far as that explains it."""

    inner: Algorithm[State]
    """Trains each component."""
    components: int = 2
    """How many, up to 8."""
    temperature: float = 1.0
    """What losses are divided by where examples are told apart: long answers are all of one component at 1."""
    spread: float = 0.02
    """Standard deviation of the noise that components begin apart by, in every coordinate."""

    def __post_init__(self) -> None:
        if not 1 <= self.components <= MOST:
            raise ValueError(f"fedem.components must be from 1 to {MOST}, got {self.components}")
        if not self.temperature > 0:
            raise ValueError(f"fedem.temperature must be above 0, got {self.temperature}")
        if not self.spread > 0:
            raise ValueError(
                f"fedem.spread must be above 0, as components that begin alike stay alike, got {self.spread}"
            )
        if self.inner.server_sees == "noisy mean":
            raise ValueError(
                "fedem cannot wrap a private algorithm, as every component would spend a budget: write private before"
                " fedem in the list"
            )
        if describe(self.inner).components > 1:
            raise ValueError("fedem cannot be in itself: give one of them all components")

    def inner_state(self, state: FedEMState[State]) -> State:
        return state.components[0]

    def describe(self, state: FedEMState[State] | None) -> Description:
        inner = Wrapper.describe(self, state).current_only("each model of the mixture learns apart")
        return replace(inner, components=self.components)

    def init(self, params: Params, seed: int) -> FedEMState[State]:
        if COEFFICIENTS in params:
            raise ValueError("fedem needs adapters or weights to be tuned, got tune: seeds")
        starts = [self._apart(params, seed, at) for at in range(self.components)]
        begun = (self.inner.init(start, _seed_of(seed, at)) for at, start in enumerate(starts))
        return FedEMState(tuple(begun))

    def _apart(self, params: Params, seed: int, at: int) -> Params:
        if not at:
            return params
        draw = generator(_seed_of(seed, at), "spread")
        normal = partial(torch.randn, generator=draw, dtype=torch.float64)
        return axpy(self.spread, params_map(lambda t: normal(t.shape).to(t), params), params)

    def broadcast(self, state: FedEMState[State], round: Round) -> Mapping[ClientId, Payload]:
        sent = [self.inner.broadcast(each, round) for each in state.components]
        parts = {client: [each[client] for each in sent] for client in sent[0]}
        made = {tuple(map(id, each)): joined(each) for each in parts.values()}
        return {client: made[tuple(map(id, each))] for client, each in parts.items()}

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        models = list(zip(self._split(task.download), self._memories(client_state), strict=True))
        chances, mixture = None, {}
        if self.components > 1:
            losses = []
            for download, memory in models:
                done = yield Losses(self.inner.deployed(download, memory))
                losses.append(done.record["losses"]["losses"])
            shares = self._shares(client_state)
            chances = responsibilities(torch.stack(losses), shares, self.temperature)
            if not bool(chances.isfinite().all()):
                raise ClientError(f"{task.client}: the loss of one of its examples is not finite")
            mixture = {"mixture": {"shares": chances.mean(1)}}
        replies, kept = [], []
        for at, (download, memory) in enumerate(models):
            own = replace(task, download=download, seed=_seed_of(task.seed, at))
            half = self.inner.client_update(own, memory)
            reply, after = yield from _weighed(half, None if chances is None else chances[at])
            replies.append(reply)
            kept.append(after)
        # The sum of losses by their chances is the one expected.
        told = [reply.metrics for reply in replies]
        metrics = {name: sum(each.get(name, 0.0) for each in told) for name in told[0]}
        upload = joined([reply.upload for reply in replies])
        return Reply(task.client, upload, replies[0].weight, metrics), {**joined(kept), **mixture}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        at = deployed_of([(share, {}) for share in self._shares(client_state).tolist()])
        return self.inner.deployed(self._split(download)[at], self._memories(client_state)[at])

    def mixture(self, download: Payload, client_state: Payload) -> Mixture:
        if self.components == 1:
            return ()
        models = map(self.inner.deployed, self._split(download), self._memories(client_state))
        return list(zip(self._shares(client_state).tolist(), models, strict=True))

    def server_update(
        self, state: FedEMState[State], round: Round, replies: Iterable[Reply]
    ) -> tuple[FedEMState[State], Metrics]:
        arrived = [(reply, self._split(reply.upload)) for reply in replies]
        states, told = [], list[Metrics]()
        for at, component in enumerate(state.components):
            own = [replace(reply, upload=parts[at]) for reply, parts in arrived]
            after, metrics = self.inner.server_update(component, round, own)
            states.append(after)
            told.append(metrics)
        return FedEMState(tuple(states)), mean_metrics(told)

    def _shares(self, client_state: Payload) -> Tensor:
        """Return (components,) float64, alike for a client that has trained nothing yet."""
        if "mixture" in client_state:
            return client_state["mixture"]["shares"]
        return torch.full((self.components,), 1 / self.components, dtype=torch.float64)

    def _split(self, payload: Payload) -> Sequence[Payload]:
        return separated(payload, self.components)

    def _memories(self, client_state: Payload) -> Sequence[Payload]:
        """Return what the inner algorithm keeps of each component."""
        return self._split({g: p for g, p in client_state.items() if g != "mixture"})


def _seed_of(seed: int, at: int) -> int:
    return derive(seed, "component", at) if at else seed


def responsibilities(losses: Tensor, shares: Tensor, temperature: float) -> Tensor:
    """Return the chance that each example is of each component, (components, examples) float64; columns sum to 1.

    Args:
        losses: (components, examples) negative log-likelihoods of whole answers, nats.
        shares: (components,) of the components before.
        temperature: What losses are divided by.
    """
    return (shares.log()[:, None] - losses / temperature).softmax(0)


def _weighed(half: ClientUpdate, weights: Tensor | None) -> ClientUpdate:
    """Run a client half whose training weighs examples so."""
    try:
        work = next(half)
        while True:
            if isinstance(work, Fit) and weights is not None:
                work = replace(work, example_weights=weights)
            work = half.send((yield work))
    except StopIteration as stop:
        answer: tuple[Reply, Payload] = stop.value
        return answer
