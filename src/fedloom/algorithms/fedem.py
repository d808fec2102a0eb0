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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Self

import torch
from torch import Tensor

from fedloom.core.description import Description, Mixture, RecipeView, deployed_of, describe
from fedloom.core.emulation import HasEmulator
from fedloom.core.params import params_map
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

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Self:
        if isinstance(recipe.tune, HasEmulator):
            raise ValueError(
                "fedem needs the whole model at its clients, which it mixes by their losses, got tune: offsite: leave one out"
            )
        return Wrapper.check(self, recipe, num_clients=num_clients)

    def inner_state(self, state: FedEMState[State]) -> State:
        return state.components[0]

    def describe(self, state: FedEMState[State] | None) -> Description:
        # A mean that stands for others would have to leave each component's clients out of the others'.
        inner = Wrapper.describe(self, state)
        return replace(inner, averages_deltas=False, components=self.components)

    def init(self, params: Params, seed: int) -> FedEMState[State]:
        if COEFFICIENTS in params:
            raise ValueError("fedem needs adapters or weights to be tuned, got tune: seeds")

        def begun(at: int) -> State:
            own = derive(seed, "component", at) if at else seed
            return self.inner.init(self._apart(params, own) if at else params, own)

        return FedEMState(tuple(begun(at) for at in range(self.components)))

    def _apart(self, params: Params, seed: int) -> Params:
        draw = generator(seed, "spread")
        return params_map(
            lambda t: (
                t + self.spread * torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t)
            ),
            params,
        )

    def broadcast(self, state: FedEMState[State], round: Round) -> Mapping[ClientId, Payload]:
        sent = [self.inner.broadcast(each, round) for each in state.components]
        made: dict[tuple[int, ...], Payload] = {}
        for client in sent[0]:
            parts = [each[client] for each in sent]
            key = tuple(map(id, parts))
            made.setdefault(key, _joined(parts))
        return {client: made[tuple(id(each[client]) for each in sent)] for client in sent[0]}

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        downloads, memories = self._parts(task.download), self._memories(client_state)
        chances, shares = None, torch.ones(1, dtype=torch.float64)
        if self.components > 1:
            losses = []
            for download, memory in zip(downloads, memories, strict=True):
                done = yield Losses(self.inner.deployed(download, memory))
                losses.append(done.record["losses"]["losses"])
            before = self._shares(client_state)
            chances = responsibilities(torch.stack(losses), before, self.temperature)
            if not bool(chances.isfinite().all()):
                raise ClientError(f"{task.client}: the loss of one of its examples is not finite")
            shares = chances.mean(1)
        replies, kept = [], dict[str, Params]()
        for at, (download, memory) in enumerate(zip(downloads, memories, strict=True)):
            own = replace(
                task,
                download=download,
                seed=derive(task.seed, "component", at) if at else task.seed,
            )
            weights = None if chances is None else chances[at]
            reply, after = yield from _weighed(self.inner.client_update(own, memory), weights)
            replies.append(reply)
            kept |= {_under(at, group): params for group, params in after.items()}
        upload = _joined([reply.upload for reply in replies])
        # Of the components' losses, by the chances, the sum is that of the mixture's expectation.
        metrics = {
            name: sum(reply.metrics.get(name, 0.0) for reply in replies)
            for name in replies[0].metrics
        }
        mixture = {"mixture": {"shares": shares}} if self.components > 1 else {}
        return Reply(task.client, upload, replies[0].weight, metrics), {**kept, **mixture}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        at = deployed_of([(share, {}) for share in self._shares(client_state).tolist()])
        memory = self._memories(client_state)[at]
        return self.inner.deployed(self._parts(download)[at], memory)

    def mixture(self, download: Payload, client_state: Payload) -> Mixture:
        if self.components == 1:
            return ()
        parts = zip(self._parts(download), self._memories(client_state), strict=True)
        models = [self.inner.deployed(part, memory) for part, memory in parts]
        return list(zip(self._shares(client_state).tolist(), models, strict=True))

    def server_update(
        self, state: FedEMState[State], round: Round, replies: Iterable[Reply]
    ) -> tuple[FedEMState[State], Metrics]:
        arrived = [(reply, self._parts(reply.upload)) for reply in replies]
        states, told = [], list[Metrics]()
        for at, component in enumerate(state.components):
            own = [replace(reply, upload=parts[at]) for reply, parts in arrived]
            after, metrics = self.inner.server_update(component, round, own)
            states.append(after)
            told.append(metrics)
        means = {n: sum(each[n] for each in told) / len(told) for n in told[0]}
        return FedEMState(tuple(states)), means

    def _shares(self, client_state: Payload) -> Tensor:
        """Return (components,) float64, alike for a client that has trained nothing yet."""
        if "mixture" in client_state:
            return client_state["mixture"]["shares"]
        return torch.full((self.components,), 1 / self.components, dtype=torch.float64)

    def _parts(self, payload: Payload) -> Sequence[Payload]:
        """Return what of a message is each component's."""
        parts: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(self.components)]
        for group, params in payload.items():
            for name, tensor in params.items():
                at, _, rest = name.partition(".")
                parts[int(at) - 1].setdefault(group, {})[rest] = tensor
        return parts

    def _memories(self, client_state: Payload) -> Sequence[Payload]:
        """Return what the inner algorithm keeps of each component."""
        return [
            {
                group.removeprefix(_under(at, "")): params
                for group, params in client_state.items()
                if group.startswith(_under(at, ""))
            }
            for at in range(self.components)
        ]


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


def _joined(parts: Sequence[Payload]) -> Payload:
    """Return messages of components as one, with the number of the component before every tensor's name."""
    joined: dict[str, dict[str, Tensor]] = {}
    for at, part in enumerate(parts):
        for group, params in part.items():
            joined.setdefault(group, {}).update(_numbered(at, params))
    return joined


def _numbered(at: int, params: Params) -> Iterator[tuple[str, Tensor]]:
    return ((_under(at, name), tensor) for name, tensor in params.items())


def _under(at: int, name: str) -> str:
    return f"{at + 1}.{name}"
