"""What an algorithm or its state is made of, whatever wraps it."""

import dataclasses
from collections.abc import Iterator
from operator import attrgetter
from typing import Any


def parts_of(value: Any) -> Iterator[Any]:
    """Yield a dataclass and those in its fields, however deep, the outermost first."""
    if dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from parts_of(attrgetter(field.name)(value))
