"""What wrappers have in common: an algorithm inside, and that they hand on what it tells and asks."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, Self, runtime_checkable

from fedloom.core.description import (
    Accounts,
    Description,
    RecipeView,
    Release,
    check,
    describe,
)
from fedloom.core.protocols import Algorithm, State


class Wrapper(Generic[State]):
    """Base of a frozen dataclass with a field `inner`. Its state is the inner one, unless it says where that is."""

    __slots__ = ()

    inner: Algorithm[State]

    def inner_state(self, state: Any) -> State:
        """Return the inner algorithm's part of a state."""
        found: State = state
        return found

    def with_inner(self, state: Any, inner: State) -> Any:
        """Return the state with another inner part."""
        return inner

    def describe(self, state: Any) -> Description:
        """Return what the inner algorithm tells."""
        return describe(self.inner, None if state is None else self.inner_state(state))

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Self:
        """Return the wrapper around what the inner algorithm becomes in a recipe."""
        inner = check(self.inner, recipe, num_clients=num_clients)
        return self if inner is self.inner else around(self, inner)

    def released(self, state: Any) -> Iterable[Release] | None:
        """Return what is on the inner algorithm's account."""
        if isinstance(self.inner, Accounts):
            return self.inner.released(self.inner_state(state))
        return None

    def charge(self, state: Any, releases: Iterable[Release]) -> Any:
        """Return the state with these releases on the inner algorithm's account."""
        if isinstance(self.inner, Accounts):
            inner = self.inner.charge(self.inner_state(state), releases)
            return self.with_inner(state, inner)
        return state


@runtime_checkable
class Wraps(Protocol):
    """Anything with an algorithm inside, derived from `Wrapper` or not."""

    @property
    def inner(self) -> Algorithm[Any]:
        """Return it."""
        ...


def around(outer: Any, inner: Algorithm[Any]) -> Any:
    """Return a wrapper around another algorithm than the one it holds."""
    return dataclasses.replace(outer, inner=inner)


def layers(algorithm: Algorithm[Any]) -> Iterator[Algorithm[Any]]:
    """Yield an algorithm and what it wraps, the outermost first."""
    yield algorithm
    if isinstance(algorithm, Wraps):
        yield from layers(algorithm.inner)


def spelled(algorithm: Algorithm[Any]) -> str:
    """Return the names of an algorithm's layers as in `flasc(scaffold)`."""
    names = [type(part).__name__.lower() for part in layers(algorithm)]
    return "(".join(names) + ")" * (len(names) - 1)


def stacked(parts: Sequence[Algorithm[Any]]) -> Algorithm[Any]:
    """Return the algorithm of which these are the layers, the outermost first."""
    *outer, algorithm = parts
    for part in reversed(outer):
        algorithm = around(part, algorithm)
    return algorithm
