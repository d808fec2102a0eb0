"""Whether what a round made of the state can be gone on with: finite, and no model farther than a bound from what there was."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fedloom.core.params import norm, sub
from fedloom.core.protocols import Params

_MODEL = "params"
"""The field that holds a model in the state of every algorithm."""


def state_fault(before: Any, after: Any, *, most: float) -> str | None:
    """Say why a new state is not to be kept; None where it is sound.

    Args:
        before: The state that the round began with.
        after: What the round made of it.
        most: The farthest that a model may be from the nearest model there was, as a norm.
    """
    if any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in _tensors(after)):
        return "the new state is not finite"
    if math.isinf(most):
        return None
    old = list(models_in(before))
    for at, model in enumerate(models_in(after)):
        # A cluster may begin anew from another's model, so the nearest counts; mostly it is that of the same place.
        first = [old[at]] if at < len(old) else []
        jump = min(_distances(model, [*first, *old], enough=most), default=0.0)
        if not jump <= most:
            return f"the model moved by {jump:.3g}, above run.max_update_norm ({most:g})"
    return None


def models_in(state: Any) -> Iterator[Params]:
    """Yield every model that a state holds, however deep."""
    if dataclasses.is_dataclass(state):
        for field in dataclasses.fields(state):
            value = attrgetter(field.name)(state)
            if field.name == _MODEL:
                yield value
            else:
                yield from models_in(value)
    elif isinstance(state, Mapping):
        yield from models_in(tuple(state.values()))
    elif isinstance(state, tuple | list):
        for value in state:
            yield from models_in(value)


def _distances(model: Params, others: list[Params], *, enough: float) -> Iterator[float]:
    """Yield distances from models of the same names, up to the first that is near enough."""
    for other in others:
        if other.keys() == model.keys():
            found = 0.0 if other is model else norm({_MODEL: sub(model, other)})
            yield found
            if found <= enough:
                return


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(attrgetter(field.name)(value))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
