"""Clusters of one size, found by the loss of each cluster's model on clients' own validation data.

Towards Federated RLHF with Aggregated Client Preference for LLMs (FedBiscuit). Wu, Liu, Wang, Wang, Su, Gao, ICLR 2025
(arXiv:2407.03038); github.com/HarliWu/FedBiscuit.

Deviations: models warm up in turns, round by round, not one after another, so that all see the same learning rates. Clients
are dealt out so that the sum of their losses is least, where the code takes them in a random order and gives each the
best model with room. The round that groups trains too: every client the model of which it reports the lowest loss. A
client without validation data goes where there is room; the code gives it losses at random.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.clustering.given import Silent, check_possible, reassigned
from fedloom.clustering.members import GLOBAL_MODEL
from fedloom.clustering.sharing import ClusteredState, Sharing, narrowed, update_clusters
from fedloom.clustering.tree import Matrix
from fedloom.core.description import RecipeView
from fedloom.core.protocols import (
    Algorithm,
    ClientError,
    ClientId,
    ClientUpdate,
    Evaluate,
    Metrics,
    Payload,
    Reply,
    Round,
    State,
    Task,
)
from fedloom.core.wrapper import spelled

_LOSSES = "losses"
"""Group of an upload: what each model loses on the client's validation data, and on how many examples."""
_MOST = 10.0
"""By how much a model may lose more than the best one and count, so that one client does not decide for all."""
_TIE = 1e-9
"""What a change of clusters costs, so that nobody changes for nothing."""


@dataclass(frozen=True, slots=True)
class Balanced(Silent):
    """As many clusters as asked, of sizes that differ by one at most, by validation loss (FedBiscuit)."""

    num_clusters: int
    """How many, each with a model of its own."""
    warm_up: int = 1
    """Rounds in which everybody drawn trains one and the same model, for each model, in turns."""
    every: int = 10
    """Rounds from one grouping to the next; everybody takes part in a round that groups. 0 groups once."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name, value, least in (
            ("num_clusters", self.num_clusters, 2),
            ("warm_up", self.warm_up, 1),
            ("every", self.every, 0),
        ):
            if value < least:
                raise ValueError(
                    f"clustered.mode.balanced.{name} must be at least {least}, got {value}"
                )

    @property
    def first(self) -> int:
        """Return the first round that groups clients."""
        return self.num_clusters * self.warm_up + 1

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> None:
        """Refuse a recipe in which nobody could be grouped.

        Raises:
            ValueError: with the setting to change.
        """
        path, whole = "clustered.mode.balanced", spelled(recipe.algorithm)
        if not whole.startswith("clustered("):
            raise ValueError(
                f"{path} sends all models in one message, which layers around it would not know: put clustered first, got"
                f" {whole}"
            )
        check_possible("balanced", self.num_clusters, num_clients)
        if not recipe.data.fractions[1]:
            raise ValueError(
                f"{path} groups clients by their validation loss, but data.fractions leaves no validation data: give the"
                " second share more than 0"
            )
        if recipe.run.rounds < self.first:
            raise ValueError(
                f"run.rounds must be at least {self.first}, as {path} groups clients in that round, after warm_up times"
                f" num_clusters others, got {recipe.run.rounds}"
            )

    def groups_in(self, round: int) -> bool:
        """Return whether clients are grouped in a round."""
        since = round - self.first
        return since == 0 or (since > 0 and self.every > 0 and since % self.every == 0)

    def turnout(self, state: ClusteredState[State], round: Round) -> Round:
        """Return the round with everybody in it where it groups them."""
        if not self.groups_in(round.number):
            return round
        return replace(round, cohort=tuple(round.population), rate=1.0)

    def broadcast(
        self, inner: Algorithm[State], state: ClusteredState[State], round: Round, share: Sharing
    ) -> Mapping[ClientId, Payload]:
        """Return what the cohort is sent: the model to train, and where clients are grouped all models beside it."""
        round, models = self.turnout(state, round), _models(state, self.num_clusters)
        own = self._trained(state, round)
        wanted = range(self.num_clusters) if self.groups_in(round.number) else {*own.values()}
        sent = {
            k: inner.broadcast(
                models.get(k, state.global_state),
                round if self.groups_in(round.number) else narrowed(round, _of(own, k)),
            )
            for k in sorted({*wanted, *own.values()})
        }
        if not self.groups_in(round.number):
            return {client: sent[own[client]][client] for client in round.cohort}
        made: dict[tuple[int, ...], Payload] = {}
        found = {}
        for client in round.cohort:
            choices = [sent[k][client] for k in range(self.num_clusters)]
            mine = sent[own[client]][client]
            key = (id(mine), *map(id, choices))
            if key not in made:
                beside = {
                    _named(k, group): params
                    for k, choice in enumerate(choices)
                    for group, params in choice.items()
                }
                made[key] = {**mine, **beside}
            found[client] = made[key]
        return found

    def client_update(
        self, inner: Algorithm[State], task: Task, client_state: Payload
    ) -> ClientUpdate:
        """Train what was sent; where all models were, report what each loses and train the best one."""
        choices = _choices(task.download)
        if not choices:
            return (yield from inner.client_update(task, client_state))
        losses, count = torch.zeros(len(choices), dtype=torch.float64), 0
        try:
            for k, choice in enumerate(choices):
                done = yield Evaluate(inner.deployed(choice, client_state))
                losses[k], count = done.metrics["loss"], done.num_examples
        except ClientError:
            count = 0  # there is no validation data here
        if not bool(losses.isfinite().all()):
            losses, count = torch.zeros_like(losses), 0
        report = {"loss": losses, "num_examples": torch.tensor(float(count), dtype=torch.float64)}
        best = _best(report)
        own = {n: g for n, g in task.download.items() if not _is_choice(n)}
        download = own if best is None else choices[best]
        reply, state = yield from inner.client_update(
            replace(task, download=download), client_state
        )
        return replace(reply, upload={**reply.upload, _LOSSES: report}), state

    def update(
        self,
        inner: Algorithm[State],
        state: ClusteredState[State],
        round: Round,
        replies: Sequence[Reply],
        share: Sharing,
    ) -> tuple[ClusteredState[State], Metrics]:
        """Return the state after a round: every model its clients' uploads, then the clusters of whoever reported."""
        round = self.turnout(state, round)
        trained = self._trained(state, round)
        for reply in replies:
            best = _best(reply.upload[_LOSSES]) if _LOSSES in reply.upload else None
            trained[reply.client] = trained[reply.client] if best is None else best
        weights = {client: {k: 1.0} for client, k in trained.items() if k != GLOBAL_MODEL}
        models, metrics = update_clusters(
            inner, _models(state, self.num_clusters), weights, round, replies
        )
        if round.number < self.first:
            # Until there are clusters the model that was trained last stands for all.
            global_state = models[next(iter(trained.values()))]
        else:
            global_state, _ = inner.server_update(state.global_state, round, iter(replies))
        after = replace(state, global_state=global_state, cluster_states=models)
        reported = {r.client: r.upload[_LOSSES] for r in replies if _LOSSES in r.upload}
        if reported:
            before = state.grouping.assignment
            found = {**before, **dealt(reported, before, self.num_clusters)}
            after = replace(after, grouping=reassigned(state.grouping, found, round.number))
        return after, metrics

    def _trained(self, state: ClusteredState[State], round: Round) -> dict[ClientId, int]:
        """Return the number of the model that each of the cohort is to train; GLOBAL_MODEL of whoever was never grouped."""
        if round.number < self.first:
            return dict.fromkeys(round.cohort, (round.number - 1) % self.num_clusters)
        return {c: state.grouping.assignment.get(c, GLOBAL_MODEL) for c in round.cohort}


def dealt(
    reports: Mapping[ClientId, Mapping[str, Tensor]],
    before: Mapping[ClientId, int],
    num_clusters: int,
) -> dict[ClientId, int]:
    """Return the cluster of each client: sizes differ by one at most, and the sum of the losses is the least there is.

    Of equal sums the one in which most stay where they were; then the first clients, by name, get the first clusters.

    Args:
        reports: Losses (clusters,) of each client, and of how many examples they are; of none they do not count.
        before: Where clients were.
        num_clusters: How many clusters there are.
    """
    from scipy.optimize import linear_sum_assignment

    clients = sorted(reports)
    costs = np.stack([_costs(reports[c], before.get(c), num_clusters) for c in clients])
    each = len(clients) // num_clusters
    # A place for each, and one more a cluster, of which no more are taken than are needed.
    dear = 2 * _MOST * (len(clients) + 1)
    places = np.concatenate([np.repeat(costs, each, axis=1), costs + dear], axis=1)
    clusters = np.concatenate([np.repeat(np.arange(num_clusters), each), np.arange(num_clusters)])
    taken = linear_sum_assignment(places)[1]
    return {client: int(clusters[at]) for client, at in zip(clients, taken, strict=True)}


def _costs(report: Mapping[str, Tensor], before: int | None, num_clusters: int) -> Matrix:
    costs: Matrix = np.zeros(num_clusters)
    if _best(report) is not None:
        losses = report["loss"].double().numpy()
        costs = np.minimum(losses - losses.min(), _MOST)
    elsewhere = [k != before for k in range(num_clusters)]
    return costs + _TIE * np.array(elsewhere, dtype=np.float64)


def _best(report: Mapping[str, Tensor]) -> int | None:
    """Return the number of the model that loses least, the first of those; None where nothing was measured."""
    return int(report["loss"].argmin()) if float(report["num_examples"]) > 0 else None


def _models(state: ClusteredState[State], num_clusters: int) -> Mapping[int, State]:
    return state.cluster_states or dict.fromkeys(range(num_clusters), state.global_state)


def _of(trained: Mapping[ClientId, int], k: int) -> set[ClientId]:
    return {client for client, model in trained.items() if model == k}


# --- all models in one message ----------------------------------------------------------------------


def _named(k: int, group: str) -> str:
    return f"model-{k}:{group}"


def _is_choice(group: str) -> bool:
    return group.startswith("model-")


def _choices(download: Payload) -> list[Payload]:
    """Return the models that a download holds beside the one to train, each as it would be sent by itself."""
    found: dict[int, dict[str, Any]] = {}
    for name in filter(_is_choice, download):
        model, _, group = name.partition(":")
        found.setdefault(int(model.removeprefix("model-")), {})[group] = download[name]
    return [found[k] for k in sorted(found)]
