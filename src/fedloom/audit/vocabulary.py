"""What a layer is given for every word of the vocabulary, where that follows from the word alone.

The inputs of a decoder's first projections are such where positions come in later, as rotary ones do: the norm of the word's
embedding. No gradient and no client is needed for it; whoever has the base model can look every word up.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.models.build import clean
from fedloom.models.introspection import embedding

_CHUNK = 4096
"""Words that are looked up at once."""
_ALIKE = 1e-5
"""Relative difference up to which two inputs are one."""


@dataclass(frozen=True)
class Entry:
    """A layer whose input is known for every word."""

    name: str
    """As tensors of the layer begin."""
    module: nn.Module


class _Reached(Exception):
    """A layer was given its input: nothing after it is needed."""


def size_of(model: nn.Module) -> int:
    """Return how many words the vocabulary has."""
    return len(embedding(model).get_parameter("weight"))


@torch.no_grad()
def entries(model: nn.Module, names: Sequence[str]) -> list[Entry]:
    """Return the layers of these names whose input at a word does not depend on where the word stands or what is before it.

    Args:
        model: Asked in evaluation mode.
        names: Of layers, without what an adapter's wrapping adds.
    """
    wanted, seen = set(names), dict[str, list[Tensor]]()
    modules: dict[str, nn.Module] = {}
    for full, module in model.named_modules():
        modules.setdefault(clean(full), module)
    chosen = {name: modules[name] for name in modules if name in wanted}
    first, second, word = _probes(size_of(model))
    device = next(model.parameters()).device
    with _watching(chosen, seen):
        for row in ([word, first], [first, word], [second, word]):
            model(input_ids=torch.tensor([row], device=device))
    found = []
    for name, inputs in seen.items():
        # Fused experts and the like are given other shapes, in which no word has a place.
        if any(x.dim() != 3 or x.shape[:2] != (1, 2) for x in inputs) or len(inputs) != 3:
            continue
        at = [inputs[0][0, 0], inputs[1][0, 1], inputs[2][0, 1]]
        if all((x - at[0]).norm() <= _ALIKE * at[0].norm() for x in at[1:]):
            found.append(Entry(name, chosen[name]))
    return found


def _probes(size: int) -> tuple[int, int, int]:
    return size // 3, size // 2, 2 * size // 3


@torch.no_grad()
def inputs(model: nn.Module, entry: Entry) -> Tensor:
    """Return what a layer is given for every word, (vocabulary, width) float32 on the CPU."""
    found, device = list[Tensor](), next(model.parameters()).device

    def stop(_: nn.Module, given: tuple[Any, ...]) -> None:
        found.append(given[0].reshape(-1, given[0].shape[-1]).float().cpu())
        raise _Reached

    handle = entry.module.register_forward_pre_hook(stop)
    try:
        for at in range(0, size_of(model), _CHUNK):
            words = torch.arange(at, min(at + _CHUNK, size_of(model)), device=device)
            try:
                model(input_ids=words[:, None])
            except _Reached:
                continue
    finally:
        handle.remove()
    return torch.cat(found)


@contextmanager
def _watching(modules: Mapping[str, nn.Module], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    """Note what modules are given, by name, in the order of their first call."""

    def note(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor):
                seen.setdefault(name, []).append(given[0].float())

        return hook

    handles = [m.register_forward_pre_hook(note(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
