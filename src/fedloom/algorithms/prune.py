"""Sparse adapters: clients train inside a mask; what is outside neither moves nor travels.

Three methods by settings, as in the code of FLASC (arXiv:2406.05233): a constant density is
SparseAdapter (He, Ding, Dong, Zhang, Tao, Findings of EMNLP 2022, arXiv:2210.04284), one that decays
Adapter-LTH (Wu, Chen, Algorithms 15(2), 2022, after Frankle, Carbin, ICLR 2019, arXiv:1803.03635),
`regrow`, by tiers if wished, Federated Select (Charles et al. 2022, arXiv:2208.09432).

Deviations: entries are ranked by their distance from the space's origin; a round is dense while
nothing has left it. Tickets are not rewound. Federated Select's slice is the server's choice, not
the client's. Values travel without positions, beside a mask on the way down; other groups are whole.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, get_args

import torch

from fedloom.core.description import Description, describe, mask_of
from fedloom.core.params import params_map
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
    Work,
)
from fedloom.core.sparsity import (
    Density,
    Scope,
    check_comparable,
    densities,
    fill,
    largest,
    num_nonzero,
    pick,
    restrict,
)
from fedloom.core.wrapper import Enclosing, Wrapper


@dataclass(frozen=True)
class PruneState(Generic[State]):
    """The inner state, and the mask that shrinks; empty before the first, and with `regrow`."""

    inner: State
    mask: Params


@dataclass(frozen=True, slots=True)
class Prune(Enclosing[State]):
    """Lets any algorithm train the entries of largest magnitude only."""

    inner: Algorithm[State]
    """Trains; outside the mask it sees zeros."""
    density: Density = Density(warm=1)
    """Share of the entries that are sent and trained."""
    regrow: bool = False
    """Whether the mask is chosen anew every round, so that entries may come back."""
    scope: Scope = "global"
    """Whether all tensors compete for places, or each has its own."""

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise ValueError(f"prune.scope must be global or tensor, got {self.scope!r}")
        if self.density.tiers and not self.regrow:
            raise ValueError("prune.density.tiers needs prune.regrow, got one mask for all clients")
        if describe(self.inner).slices and not self.regrow:
            raise ValueError(
                "prune keeps one mask of all tuned entries, got tune.lora.ranks, side or fedlora.prune, of which"
                " clients are sent some columns: leave them out, set prune.regrow, or take flasc"
            )
        check_comparable(self.inner, "prune.density", apart=bool(self.density.tiers))

    def describe(self, state: PruneState[State] | None) -> Description:
        # Values travel without positions, which only those who share a mask have in common.
        return Wrapper.describe(self, state).current_only(
            "values travel without positions, in the mask of the round"
        )

    def init(self, params: Params, seed: int) -> PruneState[State]:
        return PruneState(self.inner.init(params, seed), self._shrunk({}, params, 1))

    def broadcast(self, state: PruneState[State], round: Round) -> Mapping[ClientId, Payload]:
        def cut(payload: Payload, density: float) -> Payload:
            params, mask = payload["params"], state.mask
            if self.regrow and density < 1 and num_nonzero(params):
                mask = largest(params, density, scope=self.scope)
            return {**payload, "params": pick(params, mask), "mask": mask} if mask else payload

        def density(client: ClientId) -> float:
            return self.density.at(round.number, round.population[client])

        return once_each(self.inner.broadcast(state.inner, round), density, cut)

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        mask = task.download.get("mask", {})
        half = self.inner.client_update(replace(task, download=_whole(task.download)), client_state)
        try:
            work = next(half)
            while True:
                work = half.send((yield _inside(work, mask)))
        except StopIteration as stop:
            reply, new_state = stop.value
        return _recut(reply, mask, pick), new_state

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return self.inner.deployed(_whole(download), client_state)

    def mask(self, download: Payload) -> Params | None:
        return mask_of(self.inner, _whole(download))

    def support(self, download: Payload) -> Payload:
        return {}  # values travel without positions

    def server_update(
        self, state: PruneState[State], round: Round, replies: Iterable[Reply]
    ) -> tuple[PruneState[State], Metrics]:
        # To everybody: a reply may stand for the whole cohort, or for an empty one.
        everybody = replace(round, cohort=tuple(round.population))
        sent = self.broadcast(state, everybody)
        one = next(iter(sent.values()))
        replies = (_recut(r, sent.get(r.client, one).get("mask", {}), fill) for r in replies)
        inner, metrics = self.inner.server_update(state.inner, round, replies)
        after = replace(everybody, number=round.number + 1)
        dense = next(iter(self.inner.broadcast(inner, after).values()))["params"]
        state = PruneState(inner, self._shrunk(state.mask, dense, after.number))
        masks = (p.get("mask", p["params"]) for p in self.broadcast(state, after).values())
        return state, {**metrics, **densities(masks)}

    def _shrunk(self, mask: Params, params: Params, round: int) -> Params:
        """Return the mask of a round, inside the one before; the same one where it is small enough."""
        density = self.density.at(round, {})
        if self.regrow or density == 1 or not num_nonzero(params):
            return mask
        smaller = largest(restrict(params, mask) if mask else params, density, scope=self.scope)
        if not mask or num_nonzero(smaller) >= num_nonzero(mask):
            return mask or smaller
        return params_map(torch.logical_and, smaller, mask)


def _whole(download: Payload) -> Payload:
    """Return the download that the inner algorithm expects; the same one where nothing was cut."""
    if "mask" not in download:
        return download
    params, mask = download["params"], download["mask"]
    cut = fill({name: params[name] for name in mask}, mask)
    return {**{n: g for n, g in download.items() if n != "mask"}, "params": {**params, **cut}}


def _recut(reply: Reply, mask: Params, how: Callable[[Params, Params], Params]) -> Reply:
    if not mask or "delta" not in reply.upload:
        return reply
    delta = reply.upload["delta"]  # some names only, around `freeze`
    delta = how(delta, {name: mask[name] for name in delta})
    return replace(reply, upload={**reply.upload, "delta": delta})


def _inside(work: Work, mask: Params) -> Work:
    if not mask or not isinstance(work, Fit):
        return work
    inside = {name: entry.to(work.start[name].dtype) for name, entry in mask.items()}
    return replace(work, mask=params_map(torch.mul, inside, work.mask) if work.mask else inside)
