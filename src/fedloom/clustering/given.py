"""Clusters that nobody has to find: those a label names, and those chance makes. What finding them is measured against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fedloom.clustering.groups import Groups
from fedloom.clustering.members import Grouping, cluster_name
from fedloom.clustering.pooling import pool
from fedloom.clustering.sharing import ClusteredState, Sharing, downloads, update_clusters
from fedloom.core.description import RecipeView, describe
from fedloom.core.protocols import (
    Algorithm,
    ClientId,
    ClientUpdate,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    State,
    Task,
)
from fedloom.core.randomness import derive


class Silent(Protocol):
    """A mode that asks clients for nothing beyond their uploads."""

    def begin(self, params: Params) -> None:
        """Take any space."""
        return

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> None:
        """Take any recipe."""
        return

    def turnout(self, state: ClusteredState[State], round: Round) -> Round:
        """Return the round: the cohort is the sampler's."""
        return round

    def broadcast(
        self, inner: Algorithm[State], state: ClusteredState[State], round: Round, share: Sharing
    ) -> Mapping[ClientId, Payload]:
        """Return what the cohort is sent: each client its cluster's model, mixed as `share` says."""
        round = self.turnout(state, round)
        return downloads(
            share.mixtures(state, round),
            round,
            lambda k, part: inner.broadcast(state.cluster_states.get(k, state.global_state), part),
            shared=share.names if state.cluster_states else (),
        )

    def client_update(
        self, inner: Algorithm[State], task: Task, client_state: Payload
    ) -> ClientUpdate:
        """Train what was sent."""
        return (yield from inner.client_update(task, client_state))


class BesideGlobal(Silent, Protocol):
    """A mode in which a model for everybody goes on learning beside those of the clusters."""

    def grouped(
        self,
        state: ClusteredState[State],
        round: Round,
        replies: Sequence[Reply],
        share: Sharing,
        global_state: State,
    ) -> tuple[Grouping, Mapping[int, State]]:
        """Return who is in which cluster from now on, and each cluster's model before the round.

        Args:
            state: Before the round.
            round: The round.
            replies: Of its cohort.
            share: What clusters have in common.
            global_state: Where a cluster begins that nobody replied of: the model for everybody after the round, or
                before it where such a cluster goes with the others.
        """
        ...

    def update(
        self,
        inner: Algorithm[State],
        state: ClusteredState[State],
        round: Round,
        replies: Sequence[Reply],
        share: Sharing,
    ) -> tuple[ClusteredState[State], Metrics]:
        """Return the state after a round: the grouping first, then every cluster its members' uploads."""
        if state.variances is not None:
            grouping, models = self.grouped(state, round, replies, share, state.global_state)
            return _pooled(inner, replace(state, grouping=grouping), models, round, replies)
        global_state, metrics = inner.server_update(state.global_state, round, iter(replies))
        grouping, models = self.grouped(state, round, replies, share, global_state)
        memberships = share.memberships(grouping)
        cluster_states, cluster_metrics = update_clusters(
            inner, models, memberships, round, replies, fallback=global_state
        )
        after = replace(
            state, global_state=global_state, cluster_states=cluster_states, grouping=grouping
        )
        return after, {**metrics, **cluster_metrics}


def _pooled(
    inner: Algorithm[State],
    state: ClusteredState[State],
    models: Mapping[int, State],
    round: Round,
    replies: Sequence[Reply],
) -> tuple[ClusteredState[State], Metrics]:
    """Return the state after a round in which every cluster is taught everybody's uploads and more of its own.

    Args:
        inner: Trains each model.
        state: Before the round, grouped by it.
        models: Of the clusters, before the round.
        round: The round.
        replies: Of its cohort.
    """
    assert state.variances is not None
    changed = round.number in state.grouping.changes
    deciding = changed and any("probe" in reply.upload for reply in replies)
    by_itself = describe(inner).rescales
    assignment, known = state.grouping.assignment, state.variances
    pooled = pool(replies, assignment, known, deciding=deciding, by_itself=by_itself)

    def taught(model: State, delta: Params) -> tuple[State, Metrics]:
        # The inner algorithm reads the mean alone, so one reply stands for all.
        return inner.server_update(model, round, [Reply("pooled", {"delta": delta})])

    global_state, metrics = taught(state.global_state, pooled.whole)
    after = replace(
        state,
        global_state=global_state,
        cluster_states={k: taught(model, pooled.move(k))[0] for k, model in models.items()},
        variances=pooled.variances,
    )
    if not pooled.means:
        return after, metrics
    told = {f"{cluster_name(k)}/lambda": value for k, value in pooled.lambdas.items()}
    known = pooled.variances
    all_of_them = {"lambda": pooled.mean_lambda, "rounds_alike": float(known.alike)}
    if known.memory.is_compared:
        all_of_them["lasting"] = known.memory.lasting
    if not by_itself:
        all_of_them["gain"] = known.pace.gain
    return after, {**metrics, **all_of_them, **told}


class _Known(BesideGlobal, Protocol):
    """A mode whose clusters are known beforehand."""

    def assigned(self, grouping: Grouping, round: Round) -> Mapping[ClientId, int]:
        """Return whose cluster is which from now on."""
        ...

    def grouped(
        self,
        state: ClusteredState[State],
        round: Round,
        replies: Sequence[Reply],
        share: Sharing,
        global_state: State,
    ) -> tuple[Grouping, Mapping[int, State]]:
        """Return the known clusters; one that begins does so where the model for everybody was."""
        grouping = reassigned(state.grouping, self.assigned(state.grouping, round), round.number)
        return grouping, {
            k: state.cluster_states.get(k, state.global_state) for k in grouping.members
        }


@dataclass(frozen=True, slots=True)
class Given(_Known):
    """One cluster for each value of an entry of clients' profiles."""

    by: str
    """The entry: `language`, `group`, ..."""

    def assigned(self, grouping: Grouping, round: Round) -> Mapping[ClientId, int]:
        """Return the number of each client's value."""
        known = {c: p[self.by] for c, p in round.population.items() if self.by in p}
        if not known:
            raise ValueError(
                f"clustered.mode.given.by must be in clients' profiles ({entries(round)}), got {self.by!r}"
            )
        return _numbered(grouping, known)


@dataclass(frozen=True, slots=True)
class Random(_Known):
    """Clusters of nearly equal size, drawn once."""

    num_clusters: int
    """How many."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if self.num_clusters < 1:
            raise ValueError(
                f"clustered.mode.random.num_clusters must be at least 1, got {self.num_clusters}"
            )

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> None:
        """Refuse more clusters than there are clients.

        Raises:
            ValueError: with the setting to change.
        """
        check_possible("random", self.num_clusters, num_clients)

    def assigned(self, grouping: Grouping, round: Round) -> Mapping[ClientId, int]:
        """Return everybody's number: what it was, or the next in turn."""
        old = grouping.assignment
        new = [client for client in round.population if client not in old]
        # Dealt in turn, so that no cluster is empty; whoever comes later goes on where the others stopped.
        new.sort(key=lambda client: derive(self.seed, "random cluster", client))
        turns = {c: (len(old) + at) % self.num_clusters for at, c in enumerate(new)}
        return {**old, **turns}


def entries(round: Round) -> str:
    """Return what clients' profiles say, by name."""
    return ", ".join(sorted({name for profile in round.population.values() for name in profile}))


def check_possible(mode: str, num_clusters: int | None, num_clients: int | None) -> None:
    """Refuse more clusters than there are clients, as far as both numbers are known.

    Raises:
        ValueError: with the setting to change.
    """
    if num_clusters is not None and num_clients is not None and num_clusters > num_clients:
        raise ValueError(
            f"clustered.mode.{mode}.num_clusters must be at most the {num_clients} clients there are, got {num_clusters}"
        )


def _numbered(grouping: Grouping, values: Mapping[ClientId, str]) -> dict[ClientId, int]:
    """Return the number of each client's value: that of those who have it, else the next."""
    numbers = {values[c]: k for c, k in grouping.assignment.items() if c in values}
    count = grouping.num_born
    for value in sorted(set(values.values()) - numbers.keys()):
        numbers[value], count = count, count + 1
    return {**grouping.assignment, **{c: numbers[value] for c, value in values.items()}}


def reassigned(old: Grouping, assignment: Mapping[ClientId, int], round: int) -> Grouping:
    """Return the grouping with clients in the clusters they are known to be in, from a round on."""
    moves = {c: k for c, k in sorted(assignment.items()) if old.assignment.get(c) != k}
    if not moves:
        return old
    clients = sorted(assignment)
    labels = tuple(assignment[client] for client in clients)
    # Nothing is compared: no similarities, no tree.
    nothing = torch.zeros(0, 0), torch.zeros(0, 4, dtype=torch.float64)
    return replace(
        old,
        assignment={client: assignment[client] for client in clients},
        clients=tuple(clients),
        groups=Groups(labels, 1.0, 0.0, *nothing),
        num_born=max(old.num_born, *(k + 1 for k in labels)),
        changes={**old.changes, round: moves},
    )
