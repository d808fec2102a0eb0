"""How clusters come about: found by us, as in FedMLLM's code, or otherwise, and their table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch

from fedloom.clustering.balanced import Balanced
from fedloom.clustering.given import BesideGlobal, Given, Random, Silent, check_possible
from fedloom.clustering.groups import Groups, cosines, ward_cut
from fedloom.clustering.members import Grouping, regrouped, renamed, with_rows
from fedloom.clustering.rows import Compare, check_product, row_of, whole_row
from fedloom.clustering.sharing import ClusteredState, Sharing, narrowed, update_clusters
from fedloom.core.description import RecipeView, describe
from fedloom.core.params import equal, sub
from fedloom.core.payloads import once_each
from fedloom.core.protocols import (
    Algorithm,
    ClientId,
    ClientUpdate,
    Fit,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    State,
    Task,
)
from fedloom.core.seed_sequences import COEFFICIENTS

START = "start"
"""The group of a download that asks for a probe: the model it begins at."""
_WALK = 64
"""Steps of a probe in seed space."""
_RAREST = 6
"""How often the rounds between probes are doubled at most."""


@dataclass(frozen=True, slots=True)
class Auto(BesideGlobal):
    """Clusters are found from probes: updates that begin at the model everybody holds."""

    num_clusters: int | None = None
    """How many; None finds out."""
    at_round: int = 1
    """The first round that may group clients."""
    enough: float = 0.5
    """Share of the clients that must have been heard before they are grouped, (0, 1]."""
    probes: int = 2
    """How often a client is probed the first times it takes part: the mean of two tells close relatives apart."""
    every: int = 10
    """Rounds after which a client that takes part is probed again; 0 never. Twice as many after as many rounds in which
    pooled clusters went nearly all the way with everybody, and so on: who is where matters little there."""
    hysteresis: float = 0.5
    """How much more similar clients of one cluster count, in units of the noise, so that groupings do not flicker."""
    compare: Compare = "B"
    """What is compared: LoRA's B, its last tensor (last_B), all, or the product BA, which needs tune.lora.origin zero."""
    sketch: int = 8192
    """Numbers a client is compared by; updates that are no longer are compared whole."""
    probe: int | None = None
    """Optimizer steps of a probe; None: as many as `local` says, in seed space 64."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        _check("auto", self.num_clusters, self.at_round, self.compare, get_args(Compare))
        if not 0 < self.enough <= 1:
            raise ValueError(f"clustered.mode.auto.enough must be in (0, 1], got {self.enough}")
        for name, value, least in (
            ("probes", self.probes, 1),
            ("every", self.every, 0),
            ("hysteresis", self.hysteresis, 0),
            ("sketch", self.sketch, 16),
            ("probe", 1 if self.probe is None else self.probe, 1),
        ):
            if not value >= least:
                raise ValueError(
                    f"clustered.mode.auto.{name} must be at least {least}, got {value}"
                )

    def begin(self, params: Params) -> None:
        """Refuse a space that cannot be compared so."""
        if self.compare == "BA":
            check_product(params)

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> None:
        """Refuse a recipe in which nobody could be grouped, or whose updates cannot be compared.

        Raises:
            ValueError: with the setting to change.
        """
        check_possible("auto", self.num_clusters, num_clients)
        _check_reached("auto", self.at_round, recipe)
        if describe(recipe.algorithm).takes_turns:
            raise ValueError(
                "clustered.mode auto compares clients' updates of different rounds, in which alternate moves different"
                " tensors: leave alternate out, or take another mode"
            )

    def due(self, state: ClusteredState[State], round: Round) -> list[ClientId]:
        """Return whom of the cohort to probe."""
        if self.num_clusters == 1:
            return []
        row_rounds, row_counts = state.grouping.row_rounds, state.grouping.row_counts
        gap = self.every
        if gap and state.variances is not None:
            gap <<= min(state.variances.alike // gap, _RAREST)
        return [
            client
            for client in round.cohort
            if row_counts.get(client, 0) < self.probes
            or 0 < gap <= round.number - row_rounds[client]
        ]

    def broadcast(
        self, inner: Algorithm[State], state: ClusteredState[State], round: Round, share: Sharing
    ) -> Mapping[ClientId, Payload]:
        """Return what the cohort is sent; whom to probe also the model that everybody holds."""
        sent = BesideGlobal.broadcast(self, inner, state, round, share)
        due = set(self.due(state, round))
        # Who is to be probed sees it from its download, as it must: replies are checked against what a download asks for.
        start = {START: state.start}
        return once_each(
            sent,
            lambda client: float(client in due),
            lambda p, asked: {**p, **start} if asked else p,
        )

    def client_update(
        self, inner: Algorithm[State], task: Task, client_state: Payload
    ) -> ClientUpdate:
        """Train what was sent; where asked, add a row to be compared by, if need be of a training more."""
        reply, new_state = yield from inner.client_update(task, client_state)
        if START not in task.download:
            return reply, new_state
        start, delta = task.download[START], reply.upload.get("delta", {})
        params = task.download["params"]
        if (
            COEFFICIENTS in start
            or self.probe
            or not delta
            or not equal(params, {name: start[name] for name in params})
        ):
            if COEFFICIENTS in start:
                # Only clients who walk along the same coordinates can be compared.
                path = torch.arange(self.probe or _WALK) % len(start[COEFFICIENTS])
                done = yield Fit(start, seed_sequence={COEFFICIENTS: path}, at_start=True)
            else:
                done = yield Fit(start, steps=self.probe)
            moved = sub(done.params, start)
            delta = {name: t for name, t in moved.items() if not delta or name in delta}
        row = row_of(start, delta, compare=self.compare, size=self.sketch)
        return replace(reply, upload={**reply.upload, "probe": {"row": row}}), new_state

    def grouped(
        self,
        state: ClusteredState[State],
        round: Round,
        replies: Sequence[Reply],
        share: Sharing,
        global_state: State,
    ) -> tuple[Grouping, Mapping[int, State]]:
        """Return the clusters with this round's probes; one without replies begins at the model for everybody."""
        rows = {r.client: r.upload["probe"]["row"] for r in replies if "probe" in r.upload}
        grouping = with_rows(state.grouping, rows, round.number)
        origins: Mapping[int, int] = {k: k for k in state.cluster_states}
        if rows and self._has_heard_enough(len(grouping.rows), round):
            grouping, origins = regrouped(
                grouping,
                round.number,
                num_clusters=self.num_clusters,
                hysteresis=self.hysteresis,
            )
        memberships = share.memberships(grouping)
        with_replies = {k for reply in replies for k in memberships.get(reply.client, ())}
        # A cluster that begins without replies of its own begins where this round leaves the model for all.
        return grouping, {
            k: state.cluster_states.get(
                origins[k], state.global_state if k in with_replies else global_state
            )
            for k in grouping.members
        }

    def _has_heard_enough(self, num_heard: int, round: Round) -> bool:
        if self.num_clusters == 1 or round.number < self.at_round:
            return False
        check_possible("auto", self.num_clusters, len(round.population))
        enough = max(self.enough * len(round.population), self.num_clusters or 2)
        return num_heard >= enough


@dataclass(frozen=True, slots=True)
class Paper(Silent):
    """FedMLLM's rule as its code has it: full turnout once, clusters a round later, plain means, labels that stay.

    Where merges tie, so that no height gives the asked number of clusters, that code puts everybody in one and stops;
    here the last merges are undone until there are as many as asked.
    """

    num_clusters: int
    """How many; the reference is told the number of languages."""
    at_round: int = 1
    """The round whose updates are compared, everybody taking part; clusters act in the round after it."""
    compare: Literal["last_B", "B", "all"] = "last_B"
    """The one tensor the reference compares (of lora_B, the last in a file), LoRA's B, or all."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        _check("paper", self.num_clusters, self.at_round, self.compare, ("last_B", "B", "all"))

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> None:
        """Refuse a recipe in which nobody could be grouped.

        Raises:
            ValueError: with the setting to change.
        """
        check_possible("paper", self.num_clusters, num_clients)
        _check_reached("paper", self.at_round, recipe)

    def turnout(self, state: ClusteredState[State], round: Round) -> Round:
        """Return the round with everybody in it where it is to group them."""
        if state.grouping.assignment or round.number < self.at_round:
            return round
        return replace(round, cohort=tuple(round.population), rate=1.0)

    def update(
        self,
        inner: Algorithm[State],
        state: ClusteredState[State],
        round: Round,
        replies: Sequence[Reply],
        share: Sharing,
    ) -> tuple[ClusteredState[State], Metrics]:
        """Return the state after a round: one model up to `at_round`, clusters from the round after it."""
        if not state.grouping.assignment:
            global_state, metrics = inner.server_update(state.global_state, round, iter(replies))
            if round.number >= self.at_round:
                state = _labelled(
                    state, round, replies, _sent(inner, state.global_state, round), self
                )
            return replace(state, global_state=global_state), metrics
        models = state.cluster_states or dict.fromkeys(state.grouping.members, state.global_state)
        stale = [] if state.cluster_states else _stale(inner, state, round, replies)
        plain = [replace(reply, weight=1.0) for reply in (*replies, *stale)]
        models = {k: models[k] for k in state.grouping.members}
        cluster_states, metrics = update_clusters(
            inner, models, share.memberships(state.grouping), round, plain
        )
        return replace(state, cluster_states=cluster_states, client_params={}), metrics


Mode = Auto | Paper | Given | Random | Balanced
MODES: dict[str, type[Mode]] = {
    "auto": Auto,
    "paper": Paper,
    "given": Given,
    "random": Random,
    "balanced": Balanced,
}


@runtime_checkable
class Regroups(Protocol):
    """A layer that groups clients, and can do so in another way."""

    @property
    def label(self) -> str:
        """Return the entry of clients' profiles that its clusters are compared with; empty for none."""
        ...

    @property
    def mode(self) -> Mode:
        """Return how its clusters come about."""
        ...

    def with_grouping(self, mode: Mode) -> Algorithm[Any]:
        """Return the layer with its clusters made so, and nothing in common between them."""
        ...


def _check(
    mode: str, num_clusters: int | None, at_round: int, compare: str, known: Sequence[str]
) -> None:
    for name, value in (("num_clusters", num_clusters), ("at_round", at_round)):
        if value is not None and value < 1:
            raise ValueError(f"clustered.mode.{mode}.{name} must be at least 1, got {value}")
    if compare not in known:
        raise ValueError(
            f"clustered.mode.{mode}.compare must be one of {', '.join(known)}, got {compare!r}"
        )


def _check_reached(mode: str, at_round: int, recipe: RecipeView) -> None:
    if at_round > recipe.run.rounds:
        raise ValueError(
            f"clustered.mode.{mode}.at_round must be at most run.rounds, which is {recipe.run.rounds}, got {at_round}"
        )


def _labelled(
    state: ClusteredState[State],
    round: Round,
    replies: Sequence[Reply],
    sent: Params,
    rule: Paper,
) -> ClusteredState[State]:
    ordered = sorted(replies, key=lambda reply: reply.client)
    deltas = {reply.client: reply.upload["delta"] for reply in ordered}
    if rule.num_clusters > len(deltas):
        raise ValueError(
            f"clustered.mode.paper.num_clusters must be at most the {len(deltas)} clients that"
            f" replied, got {rule.num_clusters}"
        )
    similarity = cosines(torch.stack([whole_row(delta, rule.compare) for delta in deltas.values()]))
    labels = ward_cut(similarity, rule.num_clusters)
    groups = Groups(labels, 1.0, 0.0, similarity, torch.zeros(0, 4, dtype=torch.float64))
    grouping = replace(state.grouping, clients=tuple(deltas), groups=groups)
    client_params = {c: {n: sent[n] + t for n, t in delta.items()} for c, delta in deltas.items()}
    named, _ = renamed(grouping, round.number, single=True)
    return replace(state, grouping=named, client_params=client_params)


def _stale(
    inner: Algorithm[State], state: ClusteredState[State], round: Round, replies: Sequence[Reply]
) -> list[Reply]:
    """Return where members that did not train stood the round before, as deltas from what is sent now."""
    fresh = {reply.client for reply in replies}
    sent = _sent(inner, state.global_state, round)
    return [
        Reply(client, {"delta": {n: t - sent[n] for n, t in params.items()}})
        for client, params in state.client_params.items()
        if client not in fresh
    ]


def _sent(inner: Algorithm[State], global_state: State, round: Round) -> Params:
    one: ClientId = next(iter(round.population))
    params: Params = inner.broadcast(global_state, narrowed(replace(round, cohort=(one,)), {one}))[
        one
    ]["params"]
    return params
