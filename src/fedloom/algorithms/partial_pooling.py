"""Partial pooling down to single clients: a model for each, as far from its cluster's as its uploads say that it is.

Self-Aware Personalized Federated Learning. Chen, Ding, Tramel, Wu, Sahu, Avestimehr, Zhang, NeurIPS 2022
(arXiv:2204.08069): personal models as in a Bayesian hierarchy, from the variance between clients and that of each.

Stein's Estimation Rule and Its Competitors: An Empirical Bayes Approach. Efron, Morris, Journal of the American Statistical
Association 68, 1973: the shrinkage.

Deviations: neither estimates from updates, nor in clusters; that is ours. A client is a cluster of its own inside its
cluster, as that is one inside all, and the rule is that of `clustered.share.pool` a level down, tensor by tensor, each round
judged by itself. With D_c the mean update of its cluster (of all clients where there are none) and u_i its own, its model
moves by D_c + mu (u_i - D_c), mu = spread / (spread + noise): spread is the variance of clients' true updates about their
cluster's, noise that of one update about the client's true one. Updates tell the sum of both only, so some of the cohort
train a second time from the same start on other batches, in seed space along other directions, too: |u - u'|^2 / 2 estimates
the noise without bias, and is sent as a number a tensor. It is that of what is sent, so nothing further out may change uploads. Halves of one training would cost nothing and say another thing: drift from the first to the second looks
like noise, and AdamW's momentum makes them alike (over ten steps, they have a third of the noise).

A client trains from its own model: the shared one and a deviation that it keeps, so that the server has no state of it. D_c is
read from the next download as the move of the shared model, per round where the client missed some; with a server optimizer
it is that one's move. At mu 0 all is the inner algorithm to the bit, at mu 1 a client that is always there trains alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic

import torch

from fedloom.clustering.balanced import Balanced
from fedloom.clustering.modes import START, Paper, Regroups
from fedloom.clustering.personal import in_order, noise_of, own_model, with_update
from fedloom.clustering.pooling import Variances, pool_clients
from fedloom.core.description import Description, describe
from fedloom.core.payloads import once_each
from fedloom.core.protocols import (
    Algorithm,
    ClientId,
    ClientUpdate,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    Sees,
    State,
    Task,
)
from fedloom.core.randomness import derive
from fedloom.core.wrapper import Enclosing, Wraps, layers, spelled

_ALONE = -1
"""The cluster of clients that have none."""


@dataclass(frozen=True)
class PartialPoolingState(Generic[State]):
    """The inner algorithm's state, and how far clients differ."""

    inner: State
    moves: int
    """Rounds that were kept."""
    variances: Variances
    """Of clients about their cluster: noise of one client's update, and spread of the true ones."""


@dataclass(frozen=True, slots=True)
class PartialPooling(Enclosing[State]):
    """What is sent begins at a client's own model; how far that is from the shared one is estimated."""

    inner: Algorithm[State]
    """Trains the shared model, or one for each cluster."""
    replicates: float = 0.25
    """Share of the cohort, at least one client, that trains a second time to tell how noisy an update is, (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 < self.replicates <= 1:
            raise ValueError(
                f"partial_pooling.replicates must be above 0 and at most 1, got {self.replicates}"
            )
        if self.inner.server_sees == "noisy mean":
            raise ValueError(
                "partial_pooling reads every upload, so it cannot wrap a private algorithm"
            )
        base = self.inner
        for part in layers(self.inner):
            if isinstance(part, Regroups) and isinstance(part, Wraps):
                base = part.inner
                if isinstance(part.mode, Paper | Balanced):
                    why = (
                        "paper, which moves models by what clients learnt a round before"
                        if isinstance(part.mode, Paper)
                        else "balanced, in which clients are sent all models"
                    )
                    raise ValueError(
                        f"partial_pooling is not for clustered.mode {why}: take another mode"
                    )
                break
        if not describe(base).averages_deltas:
            raise ValueError(
                "partial_pooling needs an algorithm whose server reads the mean of `delta` and nothing else of the uploads,"
                f" or clusters around one, got {spelled(base)}: wrap another, or take ditto"
            )

    @property
    def server_sees(self) -> Sees:
        return "each in full" if self.inner.server_sees == "each in full" else "each"

    def describe(self, state: PartialPoolingState[State] | None) -> Description:
        why = "how much clients share is estimated from updates that begin at one model"
        return replace(Enclosing.describe(self, state).current_only(why), measures_noise=True)

    def init(self, params: Params, seed: int) -> PartialPoolingState[State]:
        return PartialPoolingState(self.inner.init(params, seed), 0, Variances())

    def broadcast(
        self, state: PartialPoolingState[State], round: Round
    ) -> Mapping[ClientId, Payload]:
        sent = self.inner.broadcast(state.inner, round)
        count = max(1, int(self.replicates * len(sent) + 0.5))
        drawn = sorted(sent, key=lambda client: derive(round.seed, "replicate", client))
        asked = set(drawn[:count])

        own = state.variances.own_shares()

        def told(payload: Payload, again: float) -> Payload:
            shares = [own.get(name, 0.0) for name in in_order(payload["params"])]
            pooling = {"mu": torch.tensor(shares, dtype=torch.float64)}
            pooling["moves"] = torch.tensor(state.moves)
            if again:
                pooling["replicate"] = torch.tensor(True)
            return {**payload, "pooling": pooling}

        return once_each(sent, lambda client: float(client in asked), told)

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        own = own_model(task.download, client_state)
        asked = replace(task, download={**task.download, "params": own})
        reply, new_state = yield from self.inner.client_update(asked, client_state)
        update = reply.upload["delta"]
        if "replicate" in task.download["pooling"]:
            # Of another seed: what the inner algorithm draws by itself, such as directions, is noise as well.
            plain = {name: group for name, group in asked.download.items() if name != START}
            other = replace(asked, download=plain, seed=derive(task.seed, "replicate"))
            again, _ = yield from self.inner.client_update(other, client_state)
            noise = {"squared": noise_of(update, again.upload["delta"])}
            reply = replace(reply, upload={**reply.upload, "noise": noise})
        return reply, {**new_state, **with_update(task.download, own, update)}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        own = {**download, "params": own_model(download, client_state)}
        return self.inner.deployed(own, client_state)

    def server_update(
        self, state: PartialPoolingState[State], round: Round, replies: Iterable[Reply]
    ) -> tuple[PartialPoolingState[State], Metrics]:
        whole = list(replies)
        plain = [
            replace(r, upload={name: p for name, p in r.upload.items() if name != "noise"})
            for r in whole
        ]
        inner, metrics = self.inner.server_update(state.inner, round, iter(plain))
        clusters = describe(self.inner, inner).clusters
        variances = pool_clients(
            plain,
            _numbers(plain, clusters.assignment if clusters else {}),
            _told(whole),
            state.variances,
        )
        sizes = {name: t.numel() for name, t in whole[0].upload["delta"].items()}
        own = variances.own_shares()
        kept = sum(n * own.get(name, 0.0) for name, n in sizes.items())
        mean = {"mu": kept / max(sum(sizes.values()), 1)}
        return PartialPoolingState(inner, state.moves + 1, variances), {**metrics, **mean}


def _told(replies: Sequence[Reply]) -> list[Mapping[str, float]]:
    """Return the estimates of the noise that were sent, by tensor."""
    found = list[Mapping[str, float]]()
    for reply in replies:
        if "noise" in reply.upload:
            names = in_order(reply.upload["delta"])
            found.append(
                dict(
                    zip(names, reply.upload["noise"]["squared"].clamp_min(0).tolist(), strict=True)
                )
            )
    return found


def _numbers(replies: Sequence[Reply], assignment: Mapping[ClientId, str]) -> dict[ClientId, int]:
    """Return the number of everybody's cluster; those without one are together."""
    numbers = {name: at for at, name in enumerate(sorted({*assignment.values()}))}
    return {r.client: numbers.get(assignment.get(r.client, ""), _ALONE) for r in replies}
