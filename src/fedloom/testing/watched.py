"""An algorithm with a look before and after each of its calls."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fedloom.core.protocols import (
    Algorithm,
    ClientId,
    ClientUpdate,
    Done,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    Sees,
    Task,
)
from fedloom.testing.compare import same

T = TypeVar("T")


class BrokenLaw(AssertionError):
    """One law that does not hold, in one sentence: what was seen, and what to do."""


@dataclass(frozen=True)
class Watched:
    """Answers as the algorithm inside does; refuses a call during which something changed that must not."""

    inner: Algorithm[Any]
    look: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    """Takes the arguments of a call by name, returns what must not change."""
    complaint: Callable[[str, Sequence[str]], str]
    """Takes the method and the names of what changed, returns the sentence."""

    @property
    def server_sees(self) -> Sees:
        return self.inner.server_sees

    def init(self, params: Params, seed: int) -> Any:
        return self._call("init", {"params": params}, lambda: self.inner.init(params, seed))

    def broadcast(self, state: Any, round: Round) -> Mapping[ClientId, Payload]:
        return self._call("broadcast", {"state": state}, lambda: self.inner.broadcast(state, round))

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        given = {"download": task.download, "client_state": client_state}
        half = self.inner.client_update(task, client_state)
        done: Done | None = None
        while True:
            before = self.look(given)
            try:
                work = next(half) if done is None else half.send(done)
            except StopIteration as stop:
                self._compare("client_update", before, given)
                result: tuple[Reply, Payload] = stop.value
                return result
            self._compare("client_update", before, given)
            done = yield work

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        given = {"download": download, "client_state": client_state}
        return self._call("deployed", given, lambda: self.inner.deployed(download, client_state))

    def server_update(
        self, state: Any, round: Round, replies: Iterable[Reply]
    ) -> tuple[Any, Metrics]:
        arrived = list(replies)
        given = {"state": state, "replies": arrived}
        return self._call(
            "server_update", given, lambda: self.inner.server_update(state, round, iter(arrived))
        )

    def _call(self, method: str, given: Mapping[str, Any], call: Callable[[], T]) -> T:
        before = self.look(given)
        result = call()
        self._compare(method, before, given)
        return result

    def _compare(self, method: str, before: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        after = self.look(given)
        names = sorted(before.keys() | after.keys())
        if changed := [n for n in names if not same(before.get(n), after.get(n))]:
            raise BrokenLaw(self.complaint(method, changed))
