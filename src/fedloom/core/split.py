"""Wrappers whose inner algorithm knows some of the tuned tensors only."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic

import torch

from fedloom.core.description import mask_of
from fedloom.core.payloads import once_each
from fedloom.core.protocols import (
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
from fedloom.core.together import support_of
from fedloom.core.wrapper import Enclosing, extended, without


@dataclass(frozen=True)
class SplitState(Generic[State]):
    """The inner state, and what the other tensors began at."""

    inner: State
    others: Params


class Split(Enclosing[State]):
    """Base of a wrapper that keeps tensors from the inner algorithm; downloads hold them as they were at the start."""

    __slots__ = ()

    @abstractmethod
    def split(self, params: Params) -> tuple[Params, Params]:
        """Return the tensors that the inner algorithm knows, and the others."""

    def broadcast(self, state: SplitState[State], round: Round) -> Mapping[ClientId, Payload]:
        """Return what the inner algorithm sends, with the other tensors."""

        def complete(payload: Payload, _: float) -> Payload:
            return {**payload, "params": {**payload["params"], **state.others}}

        return once_each(self.inner.broadcast(state.inner, round), lambda _: 0.0, complete)

    def mask(self, download: Payload) -> Params | None:
        """Return what of the inner algorithm's model learns; of the other tensors it knows nothing."""
        known, others = self.split(download["params"])
        mask = mask_of(self.inner, {**download, "params": known})
        ones = {n: torch.ones((), dtype=t.dtype) for n, t in others.items()}
        return mask and {**mask, **ones}

    def support(self, download: Payload) -> Payload:
        """Return where the inner algorithm's uploads are not 0."""
        known, _ = self.split(download["params"])
        return support_of(self.inner, {**download, "params": known})

    def server_update(
        self, state: SplitState[State], round: Round, replies: Iterable[Reply]
    ) -> tuple[SplitState[State], Metrics]:
        """Return the state after the inner algorithm took the replies."""
        known = without(replies, state.others.keys())
        inner, metrics = self.inner.server_update(state.inner, round, known)
        return replace(state, inner=inner), metrics


class Frozen(Split[State]):
    """Base of a wrapper whose other tensors no client moves: on a client the inner algorithm's work has them, masked."""

    __slots__ = ()

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        """Yield the inner algorithm's work on all tensors, and return its answer."""
        moving, frozen = self.split(task.download["params"])
        download = {**task.download, "params": moving}
        half = self.inner.client_update(replace(task, download=download), client_state)
        try:
            work = next(half)
            while True:
                done = yield extended(work, frozen, learns=False)
                learnt, _ = self.split(done.params)
                work = half.send(replace(done, params=learnt))
        except StopIteration as stop:
            answer: tuple[Reply, Payload] = stop.value
            return answer

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        """Return what the inner algorithm's client would use, with the other tensors as they were sent."""
        moving, frozen = self.split(download["params"])
        params = self.inner.deployed({**download, "params": moving}, client_state)
        # The same object where clients share it, so that it is measured once.
        return download["params"] if params is moving else {**params, **frozen}
