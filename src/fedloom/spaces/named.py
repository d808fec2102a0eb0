"""The tensors of a model that are learnt, by name."""

from collections.abc import Sequence

from torch import nn

from fedloom.models.build import clean


def chosen(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the tensors with one of the names among the parts of their own; all, where none are given.

    Raises:
        ValueError: where no tensor has a name.
    """
    named = {clean(name): parameter for name, parameter in model.named_parameters()}
    if not names:
        return named
    for part in names:
        if not any(_has(name, part) for name in named):
            raise ValueError(
                "tune.weights must name parts of tensors' names, as in"
                f" {', '.join(list(named)[:3])}; no tensor has {part}"
            )
    return {name: p for name, p in named.items() if any(_has(name, part) for part in names)}


def _has(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."
