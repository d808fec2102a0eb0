"""Spaces whose coordinates are the model's own tensors, chosen by name: an adapter's, or all of them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from fedloom.core.protocols import Params
from fedloom.models.build import clean, fingerprint
from fedloom.models.introspection import listed_groups
from fedloom.models.quantized import quantized_identity
from fedloom.models.reach import unread

Origin = Literal["initial", "zero"]


def check_origin(origin: str, *, path: str) -> None:
    """Refuse an origin that is none; `path` is where the recipe has it."""
    if origin not in get_args(Origin):
        raise ValueError(f"{path} must be {' or '.join(get_args(Origin))}, got {origin}")


class Space(Protocol):
    """Params <-> model."""

    left_frozen: str
    """What stays frozen although it might have been expected to learn, in a sentence; empty where there is nothing."""

    @property
    def model(self) -> nn.Module:
        """Return the model that `load` changes."""
        ...

    def start(self) -> Params:
        """Return the coordinates of the model everybody holds."""
        ...

    def load(self, params: Params) -> None:
        """Let the model stand at `params`, in place."""
        ...

    def standing_at(self, params: Params) -> AbstractContextManager[None]:
        """Let the model stand at `params` for a while, and then where it stood, to the bit."""
        ...

    def identity(self) -> Mapping[str, str]:
        """Return what both sides must have in common, see handshake; hashed once."""
        ...

    def save(self, folder: Path, params: Params) -> None:
        """Write params as others read them: the folder of an adapter, else a whole model."""
        ...

    def save_merged(self, folder: Path, params: Params) -> None:
        """Write a plain model that needs no adapter."""
        ...


class Tunable(Protocol):
    """What gradient descent works in: one flat vector of tensor values, and how it is told as params."""

    @property
    def values(self) -> Tensor:
        """Return the tensors' values as they stand, (numel,)."""
        ...

    @property
    def layout(self) -> "Layout":
        """Return where each name of params lies in a vector."""
        ...

    def vector(self, params: Params) -> Tensor:
        """Return params as they are, (numel,), where the model is."""
        ...

    def absolute_vector(self, params: Params) -> Tensor:
        """Return the tensors' values at params, (numel,), where the model is."""
        ...

    def coordinates(self, values: Tensor) -> Params:
        """Return the coordinates of a (numel,) vector of tensor values, fresh and on the CPU."""
        ...


@dataclass(frozen=True)
class Layout:
    """Where each name lies in a flat vector."""

    shapes: Mapping[str, torch.Size]

    @property
    def _sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes.values()]

    def flatten(self, params: Params) -> Tensor:
        """Return params as a fresh (numel,) vector; a scalar covers its whole name.

        Raises:
            ValueError: where names or shapes are not the space's.
        """
        if params.keys() != self.shapes.keys():
            raise ValueError(
                f"params differ from the space in {sorted(params.keys() ^ self.shapes.keys())[:4]}"
            )
        for name, shape in self.shapes.items():
            if params[name].shape not in (shape, torch.Size()):
                raise ValueError(
                    f"params of {name} must have shape {tuple(shape)}, got {tuple(params[name].shape)}"
                )
        return torch.cat(
            [params[name].expand(shape).reshape(-1) for name, shape in self.shapes.items()]
        )

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of the last dimension, by name: (..., numel) -> (..., *shape)."""
        parts = zip(self.shapes.items(), torch.split(flat, self._sizes, dim=-1), strict=True)
        return {name: part.view((*part.shape[:-1], *shape)) for (name, shape), part in parts}


class Seated:
    """The model's own tensors, re-seated in one flat vector, so that a copy of all is one copy."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, nn.Parameter]) -> None:
        self.model = model
        self.parameters: Sequence[nn.Parameter] = list(tensors.values())
        self.layout = Layout({name: p.shape for name, p in tensors.items()})
        self.values = torch.cat([p.detach().reshape(-1) for p in self.parameters])  # (numel,)
        for parameter, view in zip(
            self.parameters, self.layout.split(self.values).values(), strict=True
        ):
            parameter.data = view

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        return self.values.device

    def gradient_vector(self) -> Tensor:
        """Return a (numel,) vector of zeros that `backward` fills: every tensor's grad is a view of it."""
        gradient = torch.zeros_like(self.values)
        for parameter, view in zip(
            self.parameters, self.layout.split(gradient).values(), strict=True
        ):
            parameter.grad = view
        return gradient

    def drop_gradients(self) -> None:
        """Let go of the vector that gradient_vector made."""
        for parameter in self.parameters:
            parameter.grad = None


class Live(Seated, ABC):
    """Coordinates in the model's own tensors.

    Args:
        model: What `load` changes.
        tensors: Those that are learnt, by name.
        origin: Where coordinates count from.
        left_frozen: See Space.
        identity: What both sides must have in common beside that of the tensors, see handshake.
        dropout: Share of an input that the learnt layers drop in training.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, nn.Parameter],
        *,
        origin: Origin,
        left_frozen: str = "",
        dropout: float = 0.0,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(model, tensors)
        self.left_frozen, self.dropout = left_frozen, dropout
        self._beside = identity or {}
        self._initial = self.values.clone()
        self._origin = self._initial if origin == "initial" else None

    def start(self) -> Params:
        start = self._initial if self._origin is None else torch.zeros_like(self._initial)
        return self.layout.split(start.to("cpu", copy=True))

    @cached_property
    def _identity(self) -> Mapping[str, str]:
        names = [f"{name} {tuple(shape)}" for name, shape in self.layout.shapes.items()]
        start = self._initial.cpu().view(torch.uint8).numpy()
        return {
            **quantized_identity(self.model),
            "base": fingerprint(self.model),
            "start": hashlib.sha256(start.data).hexdigest(),
            "tensors": hashlib.sha256("\n".join(names).encode()).hexdigest(),
            **self._beside,
        }

    def identity(self) -> Mapping[str, str]:
        """Return what both sides must have in common, see handshake; hashed once."""
        return self._identity

    @abstractmethod
    def save(self, folder: Path, params: Params) -> None:
        """Write params as others read them."""

    @abstractmethod
    def save_merged(self, folder: Path, params: Params) -> None:
        """Write a plain model that needs no adapter."""

    def load(self, params: Params) -> None:
        with torch.no_grad():
            self.values.copy_(self.absolute_vector(params))

    @contextmanager
    def standing_at(self, params: Params) -> Iterator[None]:
        stood = self.values.clone()
        self.load(params)
        try:
            yield
        finally:
            self.values.copy_(stood)

    def absolute(self, params: Params) -> Params:
        """Return the values of the tensors themselves at `params`."""
        return self.layout.split(self.absolute_vector(params).cpu())

    def relative(self, values: Mapping[str, Tensor]) -> Params:
        """Return fresh coordinates of tensor values."""
        return self.coordinates(self.vector(values))

    def vector(self, params: Params) -> Tensor:
        """Return params as they are, (numel,), where the model is."""
        return self.layout.flatten(params).to(self.values)

    def absolute_vector(self, params: Params) -> Tensor:
        """Return the tensors' values at params, (numel,), where the model is."""
        vector = self.vector(params)
        return vector if self._origin is None else vector.add_(self._origin)

    def coordinates(self, values: Tensor) -> Params:
        """Return the coordinates of a (numel,) vector of tensor values, fresh and on the CPU."""
        moved = values.clone() if self._origin is None else values - self._origin
        return self.layout.split(moved.cpu())


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
    learnt = {name: p for name, p in named.items() if name not in silent}
    for part in names:
        if not any(_has(name, part) for name in learnt):
            raise ValueError(f"{path} must name tensors that a pass over text reads, got {part}")
    left = listed_groups(named.keys() & silent)
    return (
        learnt,
        f"no pass over text reads these tensors, which stay frozen: {left}" if left else "",
    )


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
