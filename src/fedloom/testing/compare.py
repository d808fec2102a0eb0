"""Whether two values are the same, and how far apart they are, whatever they are made of."""

import dataclasses
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor


def same(a: Any, b: Any) -> bool:
    """Return whether two values hold the same, tensors to the bit and of one type."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype is b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return same(attributes(a), attributes(b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def attributes(value: Any) -> dict[str, Any]:
    """Return all that an object stores: its fields, and what was written beside them."""
    named = [field.name for field in dataclasses.fields(value)]
    try:
        beside = vars(value)
    except TypeError:  # slotted
        beside = {}
    return {**{name: attrgetter(name)(value) for name in named}, **beside}


def distance(a: Any, b: Any) -> tuple[float, float]:
    """Return the largest difference of any two tensors, and the largest entry of `a`."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    worst = max((float((x - y).abs().max()) for x, y in pairs if x.numel()), default=0.0)
    return worst, max((float(x.abs().max()) for x, _ in pairs if x.numel()), default=0.0)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor as float64, dicts sorted by key."""
    if isinstance(value, Tensor):
        yield value.double()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(attrgetter(field.name)(value))
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield from tensors(value[name])
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
