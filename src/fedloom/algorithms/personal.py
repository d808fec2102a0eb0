"""Some of the tuned tensors stay at their client, in any algorithm; FedSA-LoRA by default.

Selective Aggregation for Low-Rank Adaptation in Federated Learning. Guo, Zeng, Wang, Fan, Wang, Qu, ICLR 2025
(arXiv:2410.01463): `local: lora_B`. Both factors learn, A is shared and B stays, so that the mean of A is all that is
averaged.

Federated Learning with Personalization Layers. Arivazhagan, Aggarwal, Singh, Choudhary 2019 (arXiv:1912.00818), FedPer:
a pattern of the last layers.

The inner algorithm lives in the space of the shared names: they alone are in its state, its client_state and its uploads.
On a client its work is extended by the client's own tensors, which train beside them and are kept in client_state. A client
that has trained nothing yet uses those that everybody began with, which downloads hold.

Deviations: the pattern is the recipe's, matched as a whole component of a name such as `layers.3` or `lora_B`. A
reply that is lost loses what its client learnt of its own in that round, as it does all client state.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic

import torch

from fedloom.core.params import zeros_like
from fedloom.core.payloads import once_each
from fedloom.core.protocols import (
    Algorithm,
    ClientId,
    ClientUpdate,
    Done,
    Fit,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    Sees,
    State,
    Task,
    Work,
)
from fedloom.core.wrapper import Wrapper


@dataclass(frozen=True)
class PersonalState(Generic[State]):
    """The inner state, and what clients' own tensors begin at."""

    inner: State
    start: Params


@dataclass(frozen=True, slots=True)
class Personal(Wrapper[State]):
    """Keeps tensors whose names match `local` at their client, where they learn beside the others."""

    inner: Algorithm[State]
    """Trains the others."""
    local: str = "lora_B"
    """A regular expression of whole components of a name: `layers.1` is not `layers.10`."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.local)
        except re.error as error:
            raise ValueError(
                f"personal.local must be a regular expression, got {self.local!r} ({error})"
            ) from error
        if not self.local:
            raise ValueError("personal.local must match some of the tuned tensors, got none")

    @property
    def server_sees(self) -> Sees:
        return self.inner.server_sees

    def inner_state(self, state: PersonalState[State]) -> State:
        return state.inner

    def with_inner(self, state: PersonalState[State], inner: State) -> PersonalState[State]:
        return replace(state, inner=inner)

    def init(self, params: Params, seed: int) -> PersonalState[State]:
        shared, own = self._split(params)
        if not own or not shared:
            what = "leave a tensor to share" if own else "match some of the tuned tensors"
            raise ValueError(
                f"personal.local must {what}, such as {next(iter(params))}, got {self.local!r}"
            )
        return PersonalState(self.inner.init(shared, seed), own)

    def broadcast(self, state: PersonalState[State], round: Round) -> Mapping[ClientId, Payload]:
        def complete(payload: Payload, _: float) -> Payload:
            return {**payload, "params": {**payload["params"], **state.start}}

        return once_each(self.inner.broadcast(state.inner, round), lambda _: 0.0, complete)

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        shared, start = self._split(task.download["params"])
        own = client_state.get("local", start)
        download = {**task.download, "params": shared}
        half = self.inner.client_update(replace(task, download=download), _without(client_state))
        try:
            work = next(half)
            while True:
                done: Done = yield _extended(work, own)
                learnt, moved = self._split(done.params)
                own = moved or own
                work = half.send(replace(done, params=learnt))
        except StopIteration as stop:
            reply, new_state = stop.value
        return reply, {**new_state, "local": own}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        shared, start = self._split(download["params"])
        inner = self.inner.deployed({**download, "params": shared}, _without(client_state))
        return {**inner, **client_state.get("local", start)}

    def server_update(
        self, state: PersonalState[State], round: Round, replies: Iterable[Reply]
    ) -> tuple[PersonalState[State], Metrics]:
        inner, metrics = self.inner.server_update(state.inner, round, replies)
        return replace(state, inner=inner), metrics

    def _split(self, params: Params) -> tuple[Params, Params]:
        """Return the shared and the client's own tensors."""
        pattern = re.compile(rf"(?:^|\.)(?:{self.local})(?:\.|$)")
        own = {n: t for n, t in params.items() if pattern.search(n)}
        return {n: t for n, t in params.items() if n not in own}, own


def _without(client_state: Payload) -> Payload:
    return {name: group for name, group in client_state.items() if name != "local"}


def _extended(work: Work, own: Params) -> Work:
    """Return work on all names: nothing pulls or offsets a client's own, nor masks them."""
    if not isinstance(work, Fit):
        return replace(work, params={**work.params, **own})
    pull, offset, mask = work.proximal, work.gradient_offset, work.mask
    free = {n: torch.ones((), dtype=t.dtype) for n, t in own.items()}
    return replace(
        work,
        start={**work.start, **own},
        proximal=pull and replace(pull, center={**pull.center, **own}),
        gradient_offset=offset and {**offset, **zeros_like(own)},
        mask=mask and {**mask, **free},
    )
