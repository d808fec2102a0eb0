"""Wrappers whose inner algorithm knows some of the tuned tensors only."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic

from fedloom.core.payloads import once_each
from fedloom.core.protocols import ClientId, Metrics, Params, Payload, Reply, Round, State
from fedloom.core.wrapper import Enclosing, without


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

    def server_update(
        self, state: SplitState[State], round: Round, replies: Iterable[Reply]
    ) -> tuple[SplitState[State], Metrics]:
        """Return the state after the inner algorithm took the replies."""
        known = without(replies, state.others.keys())
        inner, metrics = self.inner.server_update(state.inner, round, known)
        return replace(state, inner=inner), metrics
