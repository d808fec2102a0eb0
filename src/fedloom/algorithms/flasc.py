"""FLASC: training is dense, both links are sparse.

Federated LoRA with Sparse Communication. Kuo, Raje, Rajesh, Smith 2024 (arXiv:2406.05233),
Algorithm 1: a client is sent the largest entries of the server's vector, trains all of them, and
sends the largest entries of what changed; the server steps its dense vector. The paper's method is
`[flasc, fedavg: {server: adamw, weighting: uniform}]` with `tune.lora.origin: zero`.

Deviations: entries are ranked by their distance from the space's origin, so with `origin: initial`
by |w - w_init|: what is not sent reads as the start everybody draws from the seed, where the paper
ranks |w| and sets to zero, which keeps nothing of LoRA's B until it outgrows A. The mask that is
evaluated and exported is that of the vector itself; the paper's code evaluates with the one of the
round before. Of equal entries the first are sent. Error feedback (Seide, Fu, Droppo, Li, Yu,
Interspeech 2014), off as in the paper, is lost with a reply that is lost. Only `params` and `delta`
are thinned; what else an inner algorithm sends stays dense. Write `freeze` around `flasc`, so that
frozen tensors do not compete. With `upload_on: download` clients send what lies where they were sent something, one mask
for all, in the place of their own largest entries; of the others only the server optimizer moves any.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from fedloom.core.description import Mixture, RecipeView, mixture_of
from fedloom.core.params import add, sub
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
    State,
    Task,
)
from fedloom.core.sparsity import (
    Density,
    Scope,
    check_comparable,
    densities,
    keep_largest,
    num_nonzero,
    restrict,
    support,
)
from fedloom.core.wrapper import Wrapper, check_unmeasured

_On = Literal["own", "download"]


@dataclass(frozen=True, slots=True)
class Flasc(Wrapper[State]):
    """Thins what any algorithm sends, and leaves its two halves dense."""

    inner: Algorithm[State]
    """Trains; its server half keeps the dense vector."""
    download: Density = Density()
    """Share of the entries of `params` that clients are sent."""
    upload: Density = Density()
    """Share of the entries of `delta` that a client sends."""
    error_feedback: bool = False
    """Add what a client did not send to its next delta; for clients that come back often."""
    scope: Scope = "global"
    """Whether all tensors compete for places, or each has its own."""
    upload_on: _On = "own"
    """Where a client's delta may lie: at its `own` largest entries, or where its `download` lies, as a secure sum needs."""

    def __post_init__(self) -> None:
        if self.upload_on not in get_args(_On):
            raise ValueError(f"flasc.upload_on must be own or download, got {self.upload_on!r}")
        if self.upload_on == "download" and self.upload != Density():
            raise ValueError("flasc.upload has no effect with upload_on: download: leave it out")
        if self.scope not in get_args(Scope):
            raise ValueError(f"flasc.scope must be global or tensor, got {self.scope!r}")
        own = self.upload_on == "own"
        if (self.upload if own else self.download).thins:
            check_unmeasured(
                self.inner, "flasc thins uploads", "write partial_pooling before flasc in the list"
            )
        apart = self.upload.thins if own else bool(self.download.tiers)
        check_comparable(self.inner, "flasc.upload", apart=apart)

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Self:
        if recipe.secure is not None and self.upload_on == "own" and self.upload.thins:
            raise ValueError(
                "flasc.upload gives every client a mask of its own, of which a secure sum would send all entries: set"
                " flasc.upload_on to download, one mask for all, or flasc.upload to 1"
            )
        if recipe.secure is not None and self.error_feedback and self.server_sees == "noisy mean":
            raise ValueError(
                "flasc.error_feedback adds what was left out to an upload that private has clipped, and in a secure sum nobody"
                " clips it again: leave flasc.error_feedback out, or put private before flasc"
            )
        return Wrapper.check(self, recipe, num_clients=num_clients)

    def support(self, download: Payload) -> Payload:
        inner = Wrapper.support(self, download)
        if self.upload_on == "own":
            return inner
        mask = support(download["params"])
        # What begins at the origin has moved nowhere yet: then everything may.
        return {**inner, "delta": mask} if num_nonzero(mask) else inner

    def init(self, params: Params, seed: int) -> State:
        return self.inner.init(params, seed)

    def broadcast(self, state: State, round: Round) -> Mapping[ClientId, Payload]:
        def thin(payload: Payload, density: float) -> Payload:
            sparse = keep_largest(payload["params"], density, scope=self.scope)
            return payload if density == 1 else {**payload, "params": sparse}

        def density(client: ClientId) -> float:
            return self.download.at(round.number, round.population[client])

        return once_each(self.inner.broadcast(state, round), density, thin)

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        reply, new_state = yield from self.inner.client_update(task, client_state)
        if "delta" not in reply.upload:
            return reply, new_state
        delta = reply.upload["delta"]
        if self.error_feedback and "unsent" in client_state:
            delta = add(delta, client_state["unsent"])
        mask = self.support(task.download).get("delta")
        if mask is not None:
            sent = restrict(delta, {name: mask[name] for name in delta})
        elif self.upload_on == "download":
            sent = delta
        else:
            sent = keep_largest(delta, self.upload.at(task.round, task.profile), scope=self.scope)
        if self.error_feedback:
            new_state = {**new_state, "unsent": sub(delta, sent)}
        return replace(reply, upload={**reply.upload, "delta": sent}), new_state

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return self.inner.deployed(download, client_state)

    def mixture(self, download: Payload, client_state: Payload) -> Mixture:
        return mixture_of(self.inner, download, client_state)

    def server_update(
        self, state: State, round: Round, replies: Iterable[Reply]
    ) -> tuple[State, Metrics]:
        state, metrics = self.inner.server_update(state, round, replies)
        # What the cohort would be sent next; a mask is chosen anew from the dense vector each time.
        sent = self.broadcast(state, replace(round, number=round.number + 1))
        return state, {**metrics, **densities(payload["params"] for payload in sent.values())}
