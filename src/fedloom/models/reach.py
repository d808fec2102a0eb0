"""What of a model takes part in a pass over text, and learns by it: the model is asked, with a short row."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedloom.models.build import clean
from fedloom.models.introspection import adapted_layer, is_transposed, numberless
from fedloom.models.positions import positions_of
from fedloom.models.probe import asked, plain_ids, virtual_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTH = 32
"""Of the row: many enough tokens for a router to send them to several experts."""


@dataclass(frozen=True, slots=True)
class Reach:
    """The linear layers of a model, by full name; the output head is none of them."""

    learning: frozenset[str]
    """A pass over text goes through them, and a loss has a gradient there. An expert counts that waits for its tokens."""
    odd: frozenset[str]
    """Called, but they take or give something else than a linear layer does, as routers may."""
    idle: frozenset[str]
    """All others."""

    @property
    def layers(self) -> frozenset[str]:
        """Return all of them."""
        return self.learning | self.odd | self.idle


def linear_layers(model: "PreTrainedModel") -> dict[str, nn.Module]:
    """Return the layers a LoRA can sit on, by full name; the output head is none of them."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_transposed(module)) and module is not head
    }


def reach(model: "PreTrainedModel") -> Reach:
    """Return which linear layers would learn with an adapter on them."""
    layers, calls = linear_layers(model), _Calls()
    ids = _row(model)
    with ExitStack() as stack:
        for name, module in layers.items():
            stack.callback(module.register_forward_hook(calls.hook(name)).remove)
        stack.enter_context(asked(model))
        stack.enter_context(torch.enable_grad())
        logits = model(input_ids=ids, use_cache=False).logits
    learning = calls.reached_from(logits) - calls.odd
    partial = {name for name in learning if calls.tokens[name] < ids.numel()}
    learning |= _waiting(layers.keys() - calls.tokens.keys(), partial)
    return Reach(
        frozenset(learning), frozenset(calls.odd), frozenset(layers.keys() - learning - calls.odd)
    )


def without_gradient(
    model: "PreTrainedModel", *, waiting: Collection[str]
) -> dict[str, nn.Parameter]:
    """Return what requires a gradient and gets none, by full name.

    Args:
        model: with adapters.
        waiting: layers in which a gradient may be missing: experts that wait for their tokens.
    """
    asking = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with asked(model), torch.enable_grad():
        logits = model(input_ids=_row(model), use_cache=False).logits
        gradients = _gradients(logits, list(asking.values()))
    return {
        name: parameter
        for (name, parameter), gradient in zip(asking.items(), gradients, strict=True)
        if gradient is None and adapted_layer(name) not in waiting
    }


@torch.no_grad()
def unread(model: "PreTrainedModel") -> set[str]:
    """Return the tensors, by clean name, that no pass over text reads; those of experts that wait for tokens are read.

    A layer is entered or it is not; a tensor of one that is not might still be read from outside. There it would find
    nothing but NaN, which takes no memory and shows.
    """
    entered: dict[str, int] = {}

    def hook(name: str) -> Any:
        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            entered[name] = _num_tokens(inputs)

        return before

    owners = {n: m for n, m in model.named_modules() if list(m.parameters(recurse=False))}
    ids = _row(model)
    with ExitStack() as stack, asked(model):
        for name, module in owners.items():
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        model(input_ids=ids, use_cache=False)
    silent = owners.keys() - entered.keys()
    silent -= _waiting(silent, {n for n, tokens in entered.items() if 0 < tokens < ids.numel()})
    heard = {id(p) for n in owners.keys() - silent for p in owners[n].parameters(recurse=False)}
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for full_name, parameter in model.named_parameters():
        if id(parameter) not in heard and parameter.is_floating_point():
            groups.setdefault(numberless(full_name), {})[clean(full_name)] = parameter
    together = [p for group in groups.values() for p in group.values()]
    if not _shows(model, ids, together):
        return {name for group in groups.values() for name in group}
    quiet = (group for group in groups.values() if not _shows(model, ids, list(group.values())))
    return {name for group in quiet for name in group}


class _Calls:
    """What linear layers were called with, and what becomes of what they gave."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}
        self.odd: set[str] = set()
        self._nothing: dict[str, Tensor] = {}

    def hook(self, name: str) -> Any:
        """Return a hook that adds a zero to the output, whose gradient tells whether a loss would reach an adapter."""

        def after(_module: nn.Module, inputs: tuple[Any, ...], out: Any) -> Any:
            self.tokens[name] = self.tokens.get(name, 0) + _num_tokens(inputs)
            # An adapter is called with the input alone, and adds to the output.
            x = inputs[0] if len(inputs) == 1 else None
            if (
                not isinstance(x, Tensor)
                or not isinstance(out, Tensor)
                or x.shape[:-1] != out.shape[:-1]
            ):
                self.odd.add(name)
                return out
            if name not in self._nothing:
                self._nothing[name] = torch.zeros(
                    (), dtype=out.dtype, device=out.device
                ).requires_grad_()
            return out + self._nothing[name]

        return after

    def reached_from(self, logits: Tensor) -> set[str]:
        """Return the layers with a gradient, zero or not."""
        if not self._nothing or not logits.requires_grad:
            return set()
        gradients = _gradients(logits, list(self._nothing.values()))
        found = zip(self._nothing, gradients, strict=True)
        return {name for name, gradient in found if gradient is not None}


def _gradients(logits: Tensor, of: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradient of a loss for each tensor, None where there is no way from one to the other."""
    return torch.autograd.grad(logits.float().square().mean(), of, allow_unused=True)


def _row(model: "PreTrainedModel") -> Tensor:
    positions = positions_of(model.config)
    room = _LENGTH if positions is None else positions - virtual_tokens(model)
    return plain_ids(model, min(room, _LENGTH))[None]


def _num_tokens(inputs: tuple[Any, ...]) -> int:
    """Return how many vectors a layer is called with, 0 where it is not known."""
    x = inputs[0] if inputs else None
    return x.shape[:-1].numel() if isinstance(x, Tensor) and x.dim() else 0


def _waiting(silent: Collection[str], partial: Collection[str]) -> set[str]:
    """Return the silent layers that differ in one number of their name from one that sees a part of the tokens.

    A router sends tokens to some of its experts; the others of the list are as much a part of the model.
    """
    routed = {mark for name in partial for mark in _marks(name)}
    return {name for name in silent if any(mark in routed for mark in _marks(name))}


def _marks(name: str) -> Iterator[str]:
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdigit():
            yield ".".join((*parts[:at], "*", *parts[at + 1 :]))


def _shows(model: "PreTrainedModel", ids: Tensor, tensors: Sequence[nn.Parameter]) -> bool:
    """Return whether a pass finds NaN that stand in the tensors' place."""
    own = [parameter.data for parameter in tensors]
    for parameter in tensors:
        parameter.data = torch.full((), torch.nan).to(parameter).expand(parameter.shape)
    try:
        with asked(model):
            return bool(model(input_ids=ids, use_cache=False).logits.isnan().any())
    finally:
        for parameter, data in zip(tensors, own, strict=True):
            parameter.data = data
