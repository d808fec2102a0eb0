"""How a model is asked about itself: with a plain row, and so that nothing of it changes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedloom.models.seeded import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plain_ids(model: "PreTrainedModel", count: int) -> Tensor:
    """Return (count,) tokens from all over the vocabulary, none of which the configuration names for another use."""
    rows = model.get_input_embeddings().weight.shape[0]
    taken = set(_special(model.config.to_dict()))
    plain = [token for token in range(rows) if token not in taken] or [0]
    every = max(len(plain) // count, 1)
    chosen = [plain[at * every % len(plain)] for at in range(count)]
    return torch.tensor(chosen, device=model.device)


@contextmanager
def asked(model: nn.Module) -> Iterator[None]:
    """Let a model answer in evaluation mode; modes and random numbers are as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with seeded(0):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _special(config: Mapping[Any, Any]) -> Iterator[int]:
    """Yield the tokens a configuration names, those of its parts too."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif "token" in str(key) and ("id" in str(key) or "index" in str(key)):
            listed = value if isinstance(value, list) else [value]
            yield from (token for token in listed if isinstance(token, int))
