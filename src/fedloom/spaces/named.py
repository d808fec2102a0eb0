"""The tensors of a model that are learnt, by name."""

from collections.abc import Sequence

from torch import nn

from fedloom.models.base_model import clean
from fedloom.models.kinds import listed_groups
from fedloom.models.reach import unread


def check_names(names: Sequence[str], *, path: str) -> None:
    """Refuse one name where a list is meant; `path` is where the recipe has it."""
    if isinstance(names, str):
        raise ValueError(f"{path} must be a list, got {names}")


def learnable(
    model: nn.Module, names: Sequence[str], *, path: str
) -> tuple[dict[str, nn.Parameter], str]:
    """Return what is chosen and read by a pass over text, and a sentence on the others, empty where there are none.

    Args:
        model: Whose tensors.
        names: Parts of their names; none: all tensors.
        path: Where the recipe has the names.

    Raises:
        ValueError: where no tensor has a name, or none of a name is read.
    """
    silent = unread(model)
    named = chosen(model, names, path=path)
    kept = {name: p for name, p in named.items() if name not in silent}
    for part in names:
        if not any(_has(name, part) for name in kept):
            raise ValueError(f"{path} must name tensors that a pass over text reads, got {part}")
    left = listed_groups(named.keys() & silent)
    return kept, f"no pass over text reads these tensors, which stay frozen: {left}" if left else ""


def chosen(model: nn.Module, names: Sequence[str], *, path: str) -> dict[str, nn.Parameter]:
    """Return the tensors with one of the names among the parts of their own; all, where none are given.

    Args:
        model: Whose tensors.
        names: Parts of their names.
        path: Where the recipe has the names.

    Raises:
        ValueError: where no tensor has a name.
    """
    named = every(model)
    if not names:
        return named
    for part in names:
        if not any(_has(name, part) for name in named):
            raise ValueError(
                f"{path} must name parts of tensors' names, as in"
                f" {', '.join(list(named)[:3])}; no tensor has {part}"
            )
    return {name: p for name, p in named.items() if any(_has(name, part) for part in names)}


def every(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all tensors by their clean name."""
    return {clean(name): parameter for name, parameter in model.named_parameters()}


def _has(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."
