"""Clusters of clients whose updates agree, found as they train, and a model for each.

Leveraging Federated Learning for Multilingual and Private Language Models via Model Clustering (FedMLLM). Talasso and
others, 2025; github.com/GabrielTalasso/FedMLLM, on OpenFedLLM (arXiv:2402.06954): `mode: paper`.

Clustered Federated Learning: Model-Agnostic Distributed Multi-Task Optimization under Privacy Constraints. Sattler,
Müller, Samek, IEEE Transactions on Neural Networks and Learning Systems 2021 (arXiv:1910.01991): clusters by the
cosine of updates that begin at one model. `mode: balanced` is that of FedBiscuit, see `clustering.balanced`.

Deviations: `mode: auto` is ours. Updates of several rounds begin at different models and say little of one another, so
a client is compared by one that begins at the model everybody holds: its first if that is what it was sent, else one
more local training (a probe), asked for when the client first takes part and every so many rounds. A sketch of it is
sent, of entries times their size: what moved far moved step after step. How many clusters there are is found; the
grouping is looked at whenever a probe came in; means are weighted as the inner algorithm says. A cluster that begins
late has the inner state of its nearest, SCAFFOLD's c included. In paper mode ties give as many clusters as asked.
How much clusters share is ours too (`share.pool`): a cluster is taught everybody's updates, and more of its own where they
differ by more than noise; `off` gives each the mean of its own clients, as the papers do.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

from fedloom.clustering.balanced import Balanced
from fedloom.clustering.given import Given, Random, entries
from fedloom.clustering.groups import adjusted_rand
from fedloom.clustering.members import Grouping, cluster_name, clusters_of
from fedloom.clustering.modes import Auto, Mode, Paper
from fedloom.clustering.pooling import Variances
from fedloom.clustering.sharing import ClusteredState, Sharing
from fedloom.core.description import Description, RecipeView, describe
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
from fedloom.core.wrapper import Wrapper, check_unmeasured, layers, spelled


@dataclass(frozen=True, slots=True)
class Clustered(Wrapper[State]):
    """Holds one state of any algorithm for all, and one for each cluster."""

    inner: Algorithm[State]
    """Trains each cluster, its server optimizer included."""
    mode: Mode = Auto()
    """How clusters come about: `auto`; `paper`, FedMLLM's rule; `balanced`, FedBiscuit's; `given` by a label; `random`."""
    share: Sharing = Sharing()
    """What clusters have in common."""
    label: str = ""
    """Entry of clients' profiles that clusters are compared with in the metrics; decides nothing."""

    def __post_init__(self) -> None:
        if self.inner.server_sees == "noisy mean":
            raise ValueError("clustered reads every upload, so it cannot wrap a private algorithm")
        if any(isinstance(part, Clustered) for part in layers(self.inner)):
            raise ValueError(
                "clustered cannot be in itself, as both would ask for probes under one name: leave one of them out"
            )
        check_unmeasured(
            self.inner,
            "clustered moves clients between models",
            "write partial_pooling before clustered in the list",
        )
        if self.share.pool == "on" and (obstacle := self._obstacle()):
            raise ValueError(f"clustered.share.pool {obstacle}: leave it out")
        if isinstance(self.mode, Paper) and describe(self.inner).slices:
            raise ValueError(
                "clustered.mode paper compares uploads entry by entry, got tune.lora.ranks, side or fedlora.prune, of which"
                " clients send some columns: leave them out, or take mode auto"
            )
        if self.share.fixed and describe(self.inner).prunes_columns:
            raise ValueError(
                "clustered.share.names, mix and temperature blend models in which a client has the same columns, and fedlora.prune"
                " cuts them in each model apart: leave one of both out"
            )
        if not isinstance(self.mode, Auto) and self.share.fixed:
            raise ValueError(
                "clustered.share.names, mix and temperature have an effect in mode auto only: leave them out"
            )

    @property
    def pools(self) -> bool:
        """Return whether how much clusters share is estimated from the uploads."""
        possible = not self.share.fixed and not self._obstacle()
        return self.share.pool == "on" or (self.share.pool == "auto" and possible)

    def _obstacle(self) -> str:
        """Return why it cannot be estimated; empty where it can."""
        if isinstance(self.mode, Paper | Balanced):
            return "is not for mode paper or balanced, whose clusters take plain means as the papers' code"
        if describe(self.inner).averages_deltas:
            return ""
        return (
            "needs an algorithm whose server reads the mean of `delta` and nothing else of the uploads, got"
            f" {spelled(self.inner)}"
        )

    @property
    def server_sees(self) -> Sees:
        if self.inner.server_sees == "each in full":
            return "each in full"
        known = isinstance(self.mode, Given | Random) and not self.pools
        return "mean of each cluster" if known and self.inner.server_sees == "mean" else "each"

    def groups(self, state: ClusteredState[State], round: Round) -> Mapping[ClientId, str]:
        self._labels(round)  # what profiles lack is refused before anybody trains
        if not isinstance(self.mode, Given | Random):
            return {}
        assigned = self.mode.assigned(state.grouping, round)
        return {client: cluster_name(k) for client, k in assigned.items()}

    def inner_state(self, state: ClusteredState[State]) -> State:
        return state.global_state

    def with_inner(self, state: ClusteredState[State], inner: State) -> ClusteredState[State]:
        return replace(state, global_state=inner)

    def describe(self, state: ClusteredState[State] | None) -> Description:
        clusters = None if state is None else clusters_of(state.grouping, state.variances)
        why = "clients are compared by updates that begin at one model"
        return replace(Wrapper.describe(self, state).current_only(why), clusters=clusters)

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Self:
        self.mode.check(recipe, num_clients=num_clients)
        found = Wrapper.check(self, recipe, num_clients=num_clients)
        if self.pools and describe(recipe.algorithm).takes_turns:
            if self.share.pool == "on":
                raise ValueError(
                    "clustered.share.pool compares updates of different rounds, in which alternate moves different tensors:"
                    " leave it out, or alternate"
                )
            found = replace(found, share=replace(self.share, pool="off"))
        if describe(recipe.algorithm).components > 1 and not isinstance(self.mode, Given | Random):
            raise ValueError(
                "clustered.mode must be given or random inside fedem, each component of which would have clusters of its own"
                f" otherwise, got {type(self.mode).__name__.lower()}"
            )
        return found

    def with_grouping(self, mode: Mode) -> Self:
        return replace(self, mode=mode, share=Sharing(pool="auto" if self.pools else "off"))

    def init(self, params: Params, seed: int) -> ClusteredState[State]:
        self.mode.begin(params)
        self.share.begin(params)
        variances = Variances() if self.pools else None
        return ClusteredState(self.inner.init(params, seed), {}, params, Grouping(), {}, variances)

    def broadcast(self, state: ClusteredState[State], round: Round) -> Mapping[ClientId, Payload]:
        return self.mode.broadcast(self.inner, state, round, self.share)

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        return (yield from self.mode.client_update(self.inner, task, client_state))

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return self.inner.deployed(download, client_state)

    def server_update(
        self, state: ClusteredState[State], round: Round, replies: Iterable[Reply]
    ) -> tuple[ClusteredState[State], Metrics]:
        after, metrics = self.mode.update(self.inner, state, round, list(replies), self.share)
        found, changes = after.grouping, after.grouping.changes.get(round.number, {})
        cluster_metrics = {
            "num_clusters": float(max(len(after.cluster_states), 1)),
            "num_heard": float(len(found.rows)),
            "confidence": found.groups.confidence,
            "moved": float(sum(c in state.grouping.assignment for c in changes)),
        }
        if labels := self._labels(round):
            cluster_metrics["adjusted_rand"] = adjusted_rand(
                [*labels.values()], [found.assignment.get(c) for c in labels]
            )
        return after, {**metrics, **cluster_metrics}

    def _labels(self, round: Round) -> Mapping[ClientId, str]:
        """Return what clusters are compared with, of whoever has it.

        Raises:
            ValueError: where nobody has it.
        """
        if not self.label:
            return {}
        found = {c: p[self.label] for c, p in round.population.items() if self.label in p}
        if not found:
            raise ValueError(
                f"clustered.label must be in clients' profiles ({entries(round)}), got {self.label!r}; "
                "name one of them, or none with algorithm.clustered.label='\"\"'"
            )
        return found
