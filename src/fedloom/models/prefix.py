"""What a model has read once and is asked to go on from many times: keys and values of a shared beginning."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.models.cache import cache_name, row_cache, whole_cache
from fedloom.models.introspection import Readout, readout

LEAST = 16
"""Tokens that rows must begin with alike for those to be read once."""


@dataclass(frozen=True)
class Prefix:
    """A beginning that was read."""

    parts: Readout
    cache: Any
    """Keys and values of one row, of all its tokens in every layer."""
    last: Tensor
    """(width,) the hidden state of its last token."""

    def states(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the hidden states of rows that go on from here.

        Args:
            rows: (length,) int64 each.

        Returns:
            (rows, longest, width); behind the end of a shorter row they mean nothing.
        """
        # On the right of a row padding is seen by nothing before it.
        ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(self.last.device)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(rows))
        return self.parts.hidden(input_ids=ids, use_cache=True, **{cache_name(): cache})

    def __len__(self) -> int:
        """Return how many tokens it has."""
        return int(self.cache.get_seq_length())

    def fill_(self, cache: Any, padding: Tensor) -> None:
        """Put what was read into an empty cache of rows that all begin with it, each behind padding of its own.

        Of every row the first len(self) places are filled, so that of a padded row the end of the beginning is left to
        be read: places, and with them distances and windows, are those of rows that are read whole.

        Args:
            cache: Changed in place.
            padding: (rows,) int64, places before the first token of each.
        """
        places = torch.arange(len(self), device=self.last.device) - padding[:, None].to(
            self.last.device
        )
        places = places.clamp(min=0)  # what stands in padding is masked
        for index, layer in enumerate(self.cache.layers):
            if layer.is_initialized:  # another layer's are taken otherwise
                keys, values = (
                    of[0][:, places].transpose(0, 1) for of in (layer.keys, layer.values)
                )
                cache.update(keys, values, index)

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (n, vocabulary) of hidden states (n, width), in float32."""
        made: Tensor = self.parts.head(states)
        return made.float()


def read_prefix(model: nn.Module, ids: Tensor) -> Prefix | None:
    """Read a beginning, (length,) int64 with at least one token.

    Returns:
        None where the model keeps something else than keys and values, has learnt tokens before them, or makes logits
        of something else than hidden states.
    """
    parts = readout(model)
    if parts is None or row_cache(model, 0) is None:
        return None
    cache = whole_cache(model)
    device = next(model.parameters()).device
    with torch.no_grad():
        states = parts.hidden(
            input_ids=ids[None].to(device), use_cache=True, **{cache_name(): cache}
        )
    return Prefix(parts, cache, states[0, -1])


def shared_beginning(rows: Sequence[Tensor]) -> Tensor:
    """Return the tokens that all rows begin with, (length,) int64; of each row one at least stays behind them."""
    first, *others = rows
    most = min(len(row) for row in rows) - 1
    alike = torch.ones(max(most, 0), dtype=torch.bool)
    for row in others:
        alike &= first[:most] == row[:most]
    return first[: sum(1 for _ in takewhile(bool, alike.tolist()))]
