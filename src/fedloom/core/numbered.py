"""Several messages as one: every tensor's name has the number of its message before it."""

from collections.abc import Sequence

from torch import Tensor

from fedloom.core.protocols import Payload


def joined(parts: Sequence[Payload]) -> Payload:
    """Return messages as one; `w` of the second is `2.w`."""
    whole: dict[str, dict[str, Tensor]] = {}
    for number, part in enumerate(parts, 1):
        for group, params in part.items():
            named = {f"{number}.{name}": tensor for name, tensor in params.items()}
            whole.setdefault(group, {}).update(named)
    return whole


def separated(payload: Payload, count: int) -> Sequence[Payload]:
    """Return the `count` messages that one was made of, with their tensors themselves; what a layer around added is left out."""
    parts: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(count)]
    for group, params in payload.items():
        for name, tensor in params.items():
            number, _, own = name.partition(".")
            if own and number.isdecimal():
                parts[int(number) - 1].setdefault(group, {})[own] = tensor
    return parts
