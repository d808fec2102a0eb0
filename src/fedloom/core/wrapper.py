"""What wrappers have in common: an algorithm inside, and that they hand on what it tells and asks."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Generic, Protocol, Self, runtime_checkable

import torch

from fedloom.core.description import (
    Accounts,
    Description,
    Mixes,
    RecipeView,
    Release,
    check,
    describe,
    mask_of,
    replayed_by,
)
from fedloom.core.params import zeros_like
from fedloom.core.protocols import (
    Algorithm,
    ClientId,
    Fit,
    Params,
    Payload,
    Reply,
    Round,
    Sees,
    State,
    Work,
)
from fedloom.core.together import groups_of, support_of


class Wrapper(Generic[State]):
    """Base of a frozen dataclass with a field `inner`. Its state is the inner one, unless it says where that is."""

    __slots__ = ()

    inner: Algorithm[State]

    @property
    def server_sees(self) -> Sees:
        """Return what the inner algorithm's server reads."""
        return self.inner.server_sees

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
        """Return the wrapper around what the inner algorithm becomes in a recipe.

        Raises:
            ValueError: where the inner one's clients answer with several models, and this wrapper knows of one only.
        """
        if describe(self.inner).components > 1 and not isinstance(self, Mixes):
            own, within = (type(each).__name__.lower() for each in (self, self.inner))
            raise ValueError(
                f"{own} around {within} would measure one of its models in the place of the mixture: write {own}"
                " after it in the list"
            )
        inner = check(self.inner, recipe, num_clients=num_clients)
        return self if inner is self.inner else around(self, inner)

    def mask(self, download: Payload) -> Params | None:
        """Return what of the inner algorithm's model learns."""
        return mask_of(self.inner, download)

    def replayed(self, state: Any, round: Round, reply: Reply) -> Reply:
        """Return a reply as the inner algorithm makes a delta of it."""
        return replayed_by(self.inner, self.inner_state(state), round, reply)

    def support(self, download: Payload) -> Payload:
        """Return where the inner algorithm's uploads are not 0."""
        # In a mixture, names are those of all models.
        return {} if self.describe(None).components > 1 else support_of(self.inner, download)

    def groups(self, state: Any, round: Round) -> Mapping[ClientId, str]:
        """Return whose uploads the inner algorithm's server reads the mean of."""
        return groups_of(self.inner, self.inner_state(state), round)

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


class Enclosing(Wrapper[State]):
    """Base of a wrapper whose state is a dataclass with the inner one as its field `inner`."""

    __slots__ = ()

    def inner_state(self, state: Any) -> State:
        """Return the inner algorithm's part of a state."""
        found: State = state.inner
        return found

    def with_inner(self, state: Any, inner: State) -> Any:
        """Return the state with another inner part."""
        return replace(state, inner=inner)


def extended(work: Work, others: Params, *, learns: bool) -> Work:
    """Return work on more tensors than an inner algorithm knows of: they learn on their own, or stay as they are."""
    if not isinstance(work, Fit):
        return replace(work, params={**work.params, **others})
    mask, offset, pull = work.mask, work.gradient_offset, work.proximal
    if not learns and mask is None:
        mask = {n: torch.ones((), dtype=t.dtype) for n, t in work.start.items()}
    free = {n: torch.full((), float(learns), dtype=t.dtype) for n, t in others.items()}
    if pull and not learns:
        # What learns and is not in the center is not pulled.
        pull = replace(pull, center={**pull.center, **others})
    return replace(
        work,
        start={**work.start, **others},
        proximal=pull,
        gradient_offset=offset and {**offset, **zeros_like(others)},
        mask=mask and {**mask, **free},
    )


def without(replies: Iterable[Reply], names: Set[str]) -> Iterator[Reply]:
    """Yield replies as an inner algorithm knows them: a wrapper outside may have filled in tensors of these names."""
    for reply in replies:
        upload = {
            group: {n: t for n, t in params.items() if n not in names}
            for group, params in reply.upload.items()
        }
        yield replace(reply, upload=upload)


def check_unmeasured(
    inner: Algorithm[Any], does: str, remedy: str = "leave one of both out"
) -> None:
    """Refuse a wrapper around an algorithm whose clients measure the noise of uploads, which the wrapper changes.

    Raises:
        ValueError: what it does, as in `flasc thins uploads`, and the remedy.
    """
    if describe(inner).measures_noise:
        raise ValueError(
            f"{does}, which partial_pooling inside it does not see where it compares updates: {remedy}"
        )


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
