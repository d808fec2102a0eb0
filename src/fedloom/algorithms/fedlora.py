"""FedAvg of low-rank adapters, whose sum is that of what they add to the model.

The mean of factors is not the factors of the mean: (sum p_i B_i)(sum p_i A_i) is not sum p_i B_i A_i. `aggregate` says
what is done about it: the means (FedIT, arXiv:2305.05644), means of padded factors (HetLoRA, arXiv:2401.06432), the nearest
product of a rank (FlexLoRA, arXiv:2402.11505), the stack (FLoRA, arXiv:2409.05976), the residual beside the means (FedEx-LoRA,
arXiv:2410.09432), B corrected for the mean of A (LoRA-FAIR, arXiv:2411.14961). Titles, authors and what the rules have of them
are in `server/factors/rules.py`. Local training is FedAvg's, with FedProx's pull if asked.

Clients of a tier with a rank r_i of its own (`tune.lora.ranks`) are sent the first r_i columns of both factors, and
train them with alpha / r_i as their scale, as in HetLoRA and FlexLoRA. In the space of the
widest the other columns are zero on both sides, so that no gradient reaches them and clients of all ranks share a batch.
Params are in units of the scale of the widest; a client divides by what its own has more, and multiplies what it sends.

`prune` is HetLoRA's pruning of ranks (section 4): a client gives up its last columns where training makes them smaller. What
it keeps it says in its upload, whose other columns are zeros, as an upload's shape does not follow from values here; the
server remembers its rank, takes no more columns of it, and sends no more from then on. The rule is in
`server/factors/pruning.py`, with what of it is ours.

Deviations: what `stack` and `residual` add up beside the adapter is a frozen pair of factors in the space (`tune.lora.side` columns),
sent as far as it holds anything; the base model stays as it is. Where it is full, the pair is cut to its largest part.

Every round tells `aggregation_error`: the Frobenius norm of what the sum of clients has and the new factors lack, over
that of the sum, all layers together. Tensors that are no factors are averaged. Where no client moved, the state stays to
the bit, although other factors may have the same product.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch

from fedloom.core.description import FILLED, Description, RecipeView
from fedloom.core.params import sub
from fedloom.core.payloads import NoReplies, to_all
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
from fedloom.core.ranks import Ranks
from fedloom.server.factors.adding import add_up, check_ranks, check_space
from fedloom.server.factors.pruning import RANK, RankPruning, without_tail
from fedloom.server.factors.rules import SVD, Aggregate
from fedloom.server.factors.slices import frozen, learning, rank_of, scaled, still, whole


@dataclass(frozen=True)
class FedLoRAState:
    """The shared factors."""

    params: Params
    used: int
    """Columns of the frozen pair that hold something, in the layer with most."""
    ranks: Mapping[ClientId, int] = field(default_factory=dict)
    """With `prune`, how many columns each client has that has replied."""


@dataclass(frozen=True, slots=True)
class FedLoRA:
    """Clients train adapters, of ranks that may differ; the server adds up their products."""

    aggregate: Aggregate = SVD()
    """How the factors of many clients become one pair."""
    mu: float = 0.0
    """Strength of FedProx's pull towards the download; 0 is none."""
    weighting: Literal["examples", "uniform"] = "examples"
    """Whether clients count by their training examples or alike."""
    prune: RankPruning | None = None
    """Whether clients give up columns that training makes smaller, and how; None: ranks stay."""
    ranks: Ranks | None = field(default=None, metadata=FILLED)
    """Those of `tune.lora`; None: one for all, and nothing beside them."""

    server_sees: ClassVar[Sees] = "each"

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise ValueError(f"fedlora.mu must be >= 0, got {self.mu}")
        if self.weighting not in ("examples", "uniform"):
            raise ValueError(
                f"fedlora.weighting must be examples or uniform, got {self.weighting!r}"
            )
        if self.prune and (self.aggregate.rule == "stack" or not self.aggregate.mixes):
            raise ValueError(
                "fedlora.prune needs clients of several ranks who go on from the columns they had, got fedlora.aggregate"
                f" {self.aggregate.rule}: take pad, svd, residual or fair"
            )

    def describe(self, state: object) -> Description:
        ranks = self.ranks
        return Description(
            multiplies_factors=True,
            slices=self.prune is not None
            or (ranks is not None and bool(ranks.tiers or ranks.side)),
            prunes_columns=self.prune is not None,
            current="the products that are added up are of factors that begin alike",
        )

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Self:
        tiers = None if num_clients is None else recipe.data.tiers
        return replace(self, ranks=check_ranks(self.aggregate, recipe.tune, tiers=tiers))

    def init(self, params: Params, seed: int) -> FedLoRAState:
        check_space(params)
        if self.prune and self.ranks is None:
            raise ValueError("fedlora.prune needs fedlora.ranks, which a recipe fills in, got none")
        return FedLoRAState(params, 0)

    def broadcast(self, state: FedLoRAState, round: Round) -> Mapping[ClientId, Payload]:
        if self.ranks is None:
            return to_all(round, {"params": state.params})
        beside = frozen(state.params, most=self.ranks.most, used=state.used)
        group = {"frozen": beside} if beside else {}
        ranks = {client: self._rank(state, client, round) for client in round.cohort}
        # One object a rank, so that it is encoded and evaluated once.
        made = {r: {"params": learning(state.params, r), **group} for r in {*ranks.values()}}
        return {client: made[rank] for client, rank in ranks.items()}

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        sent, ranks, prune = task.download["params"], self.ranks, self.prune
        rank = rank_of(sent) if ranks else 0
        gain = ranks.gains[rank] if ranks else 1.0
        start = scaled(self._whole(task.download), 1 / gain)
        mask = self.mask(task.download)
        pull = Proximal(self.mu, start) if self.mu else None
        tail = prune.tail(start, rank) if prune else None
        done = yield Fit(start, proximal=pull, mask=mask, gain=gain, tail=tail)
        weight = done.num_examples if self.weighting == "examples" else 1.0
        moved = sub(done.params, start)
        delta = scaled(learning(moved, rank), gain) if ranks else moved
        assert all(delta[name].shape == sent[name].shape for name in sent)
        upload: dict[str, Params] = {"delta": delta}
        if prune:
            kept = prune.after(start, done.params, rank)
            upload = {"delta": without_tail(delta, kept), RANK: {RANK: torch.tensor(kept)}}
        return Reply(task.client, upload, weight, done.metrics), {}

    def mask(self, download: Payload) -> Params | None:
        if self.ranks is None or "frozen" not in download:
            return None
        return still(self._whole(download), most=self.ranks.most)

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return self._whole(download)

    def server_update(
        self, state: FedLoRAState, round: Round, replies: Iterable[Reply]
    ) -> tuple[FedLoRAState, Metrics]:
        arrived = sorted((r for r in replies if r.weight), key=lambda reply: reply.client)
        if not arrived:
            raise NoReplies("no client replied")
        deltas = [reply.upload["delta"] for reply in arrived]
        kept: dict[ClientId, int] = {}
        if self.prune:
            had = {reply.client: self._rank(state, reply.client, round) for reply in arrived}
            kept = self.prune.said(arrived, had)
            deltas = [learning(d, k) for d, k in zip(deltas, kept.values(), strict=True)]
        if not any(bool(t.any()) for delta in deltas for t in delta.values()):
            return state, {"aggregation_error": 0.0}
        added = add_up(
            self.aggregate,
            state.params,
            deltas,
            weights=[reply.weight for reply in arrived],
            ranks=self.ranks,
            used=state.used,
            seed=round.seed,
        )
        metrics = {"aggregation_error": added.error}
        if self.aggregate.beside:
            metrics["frozen_rank"] = float(added.used)
        if self.prune:
            metrics["mean_rank"] = sum(kept.values()) / len(kept)
        return FedLoRAState(added.params, added.used, {**state.ranks, **kept}), metrics

    def _rank(self, state: FedLoRAState, client: ClientId, round: Round) -> int:
        assert self.ranks is not None
        whole = self.ranks.of(round.population[client])
        return min(whole, state.ranks.get(client, whole))

    def _whole(self, download: Payload) -> Params:
        sent, ranks = download["params"], self.ranks
        if ranks is None:
            return sent
        return whole(sent, download.get("frozen", {}), most=ranks.most, side=ranks.side)
