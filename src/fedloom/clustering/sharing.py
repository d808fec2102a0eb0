"""What the clients of clusters share: whose model each is sent, and which one its updates go into."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, get_args

import torch

from fedloom.clustering.members import GLOBAL_MODEL, Grouping
from fedloom.clustering.pooling import Variances
from fedloom.core.params import axpy, scale
from fedloom.core.payloads import NoReplies, mean_metrics
from fedloom.core.protocols import (
    Algorithm,
    ClientId,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    State,
)
from fedloom.server.combine.robust import TooFew

Pool = Literal["auto", "on", "off"]

_LEAST = 0.01
"""Clusters a client belongs to by less are none of its."""

Weights = Mapping[ClientId, Mapping[int, float]]
"""How much of which model a client is sent, or trains; GLOBAL_MODEL where it has no cluster."""


@dataclass(frozen=True)
class ClusteredState(Generic[State]):
    """A model for all, one for each cluster, and the grouping."""

    global_state: State
    """As if nobody were apart; whoever has no cluster uses it."""
    cluster_states: Mapping[int, State]
    """The inner algorithm's state of each cluster."""
    start: Params
    """Where updates that are compared begin: the model everybody holds."""
    grouping: Grouping
    client_params: Mapping[ClientId, Params]
    """The reference's rule only: where clients stood in the round that groups them."""
    variances: Variances | None = None
    """Pooled clusters only: how far clients and clusters differ."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """What clusters have in common, and how sharply they are told apart."""

    names: Sequence[str] = ()
    """Parts of the names of tensors that all clusters train together, such as lora_A."""
    mix: float = 0.0
    """Share of the model for all in what a cluster's clients are sent, [0, 1)."""
    temperature: float = 0.0
    """Clients use and train all clusters they resemble, the more evenly the higher it is; 0: their own only."""
    pool: Pool = "auto"
    """Whether each cluster goes with all clients, and its own way as far as uploads differ by more than noise. `auto`: where
    that can be told from the uploads, and nothing else is set here; `off`: a model for each, of its own clients alone."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if isinstance(self.names, str) or not all(self.names):
            raise ValueError(f"clustered.share.names must be a list of names, got {self.names!r}")
        if not 0 <= self.mix < 1:
            raise ValueError(f"clustered.share.mix must be in [0, 1), got {self.mix}")
        if not self.temperature >= 0:
            raise ValueError(f"clustered.share.temperature must be >= 0, got {self.temperature}")
        if self.pool not in get_args(Pool):
            raise ValueError(
                f"clustered.share.pool must be one of {', '.join(get_args(Pool))}, got {self.pool!r}"
            )
        if self.pool == "on" and self.fixed:
            raise ValueError(
                f"clustered.share.pool estimates how much clusters share: leave out {' and '.join(self.fixed)}"
            )

    @property
    def fixed(self) -> Sequence[str]:
        """Return which settings say what is shared, so that it is not estimated."""
        said = {"names": self.names, "mix": self.mix, "temperature": self.temperature}
        return [name for name, value in said.items() if value]

    def begin(self, params: Params) -> None:
        """Refuse names that no tuned tensor has, or that leave clusters nothing of their own.

        Raises:
            ValueError: with a name that there is.
        """
        unknown = [part for part in self.names if not any(part in name for name in params)]
        if unknown:
            raise ValueError(
                f"clustered.share.names must be parts of tuned tensors' names, such as {next(iter(params))}, got {unknown[0]!r}"
            )
        if self.names and all(_any(name, self.names) for name in params):
            raise ValueError(
                f"clustered.share.names must leave a tensor that is not shared, got {list(self.names)!r}"
            )

    def memberships(self, grouping: Grouping) -> Weights:
        """Return which clusters each client that has one trains, and by how much."""
        if not self.temperature or not grouping.assignment:
            return {client: {cluster: 1.0} for client, cluster in grouping.assignment.items()}
        clusters = list(grouping.members)
        labels = [clusters.index(grouping.assignment[client]) for client in grouping.clients]
        member = torch.nn.functional.one_hot(torch.tensor(labels)).double()
        cosines = grouping.groups.similarity.double().clone().fill_diagonal_(0)
        mean = cosines @ member / (member.sum(0) - member).clamp_min(1)
        # The cosines' own noise is the unit of the temperature.
        soft = torch.softmax(mean / (self.temperature * max(grouping.groups.noise, 1e-6)), dim=1)
        weights = torch.where(soft < _LEAST, 0, soft)
        weights = weights / weights.sum(1, keepdim=True)
        return {
            client: {k: w for k, w in zip(clusters, shares, strict=True) if w}
            for client, shares in zip(grouping.clients, weights.tolist(), strict=True)
        }

    def mixtures(self, state: ClusteredState[State], round: Round) -> Weights:
        """Return what the cohort is sent: what it trains, mixed with the model for all; that alone without a cluster."""

        memberships = self.memberships(state.grouping)

        def of(client: ClientId) -> Mapping[int, float]:
            parts = memberships.get(client, {}) if state.cluster_states else {}
            if not parts:
                return {GLOBAL_MODEL: 1.0}
            own = {k: (1 - self.mix) * w for k, w in parts.items()}
            return {**own, GLOBAL_MODEL: self.mix} if self.mix else own

        return {client: of(client) for client in round.cohort}


def narrowed(round: Round, clients: Collection[ClientId]) -> Round:
    """Return the round as the inner algorithm of some clients sees it."""
    population = {c: p for c, p in round.population.items() if c in clients}
    cohort = tuple(c for c in round.cohort if c in population)
    return replace(round, population=population, cohort=cohort)


def update_clusters(
    inner: Algorithm[State],
    models: Mapping[int, State],
    weights: Weights,
    round: Round,
    replies: Sequence[Reply],
    *,
    fallback: State | None = None,
) -> tuple[dict[int, State], Metrics]:
    """Return every model after the replies of those who train it, and the mean metrics; without enough it stays.

    Args:
        inner: Trains each model.
        models: Before the round.
        weights: How much of which model a client trains.
        round: The whole round.
        replies: Of all.
        fallback: State of a model that too few clients train for the inner rule, whoever replies.
    """
    after, metrics, small = dict[int, State](), list[Metrics](), 0
    for k, model in models.items():
        own = {client: parts[k] for client, parts in weights.items() if k in parts}
        mine = [replace(r, weight=r.weight * own[r.client]) for r in replies if r.client in own]
        after[k] = model
        if not mine:
            continue
        try:
            after[k], reported = inner.server_update(model, narrowed(round, own), iter(mine))
            metrics.append(reported)
        except TooFew as few:
            small += 1
            if fallback is not None and len(own) < few.needed:
                after[k] = fallback
        except NoReplies:
            continue
    return after, {**mean_metrics(metrics), **({"num_too_small": float(small)} if small else {})}


def downloads(
    weights: Weights,
    round: Round,
    send: Callable[[int, Round], Mapping[ClientId, Payload]],
    *,
    shared: Sequence[str] = (),
) -> Mapping[ClientId, Payload]:
    """Return what the cohort is sent, one object where clients get the same.

    Args:
        weights: Of the cohort.
        round: The whole round.
        send: What the clients of a narrowed round are sent of a model.
        shared: Parts of the names of tensors that are the global model's for everybody.
    """
    users: dict[int, set[ClientId]] = {}
    for client, parts in weights.items():
        for model in {*parts, GLOBAL_MODEL} if shared else parts:
            users.setdefault(model, set()).add(client)
    sent = {model: send(model, narrowed(round, users[model])) for model in sorted(users)}
    made: dict[object, tuple[Payload, list[Payload]]] = {}
    found = {}
    for client in round.cohort:
        parts = weights[client]
        used = {
            model: sent[model][client]
            for model in sorted({*parts, GLOBAL_MODEL} if shared else parts)
        }
        key = (*parts.items(), *map(id, used.values()))
        if key not in made:
            # The parts are kept beside it: an id is unique only while its object lives.
            made[key] = _blend(parts, used, shared), list(used.values())
        found[client] = made[key][0]
    return found


def _blend(
    parts: Mapping[int, float], used: Mapping[int, Payload], shared: Sequence[str]
) -> Payload:
    main = max(parts, key=lambda model: parts[model])
    if len(used) == 1:
        return used[main]
    params = used[main]["params"] if len(parts) == 1 else _mean(parts, used)
    common = {
        n: t for n, t in used.get(GLOBAL_MODEL, {}).get("params", {}).items() if _any(n, shared)
    }
    return {**used[main], "params": {**params, **common}}


def _mean(parts: Mapping[int, float], used: Mapping[int, Payload]) -> Params:
    (first, weight), *others = parts.items()
    total = scale(used[first]["params"], weight)
    for model, weight in others:
        total = axpy(weight, used[model]["params"], total)
    return total


def _any(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)
