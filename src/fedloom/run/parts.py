"""What an algorithm or its state is made of, whatever wraps it."""

import dataclasses
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, TypeVar

T = TypeVar("T")


def parts_of(value: Any) -> Iterator[Any]:
    """Yield a dataclass and those in its fields, however deep, the outermost first."""
    if dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from parts_of(attrgetter(field.name)(value))


def with_parts(value: Any, kind: type[T], change: Callable[[T], T]) -> Any:
    """Return a dataclass with those parts of a kind changed, however deep."""
    if isinstance(value, kind):
        return change(value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    parts = {f.name: attrgetter(f.name)(value) for f in dataclasses.fields(value) if f.init}
    return dataclasses.replace(value, **{n: with_parts(v, kind, change) for n, v in parts.items()})
