"""What a model has read once and is asked to go on from many times: keys and values of a shared beginning."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedloom.models.generation import cache_name, row_cache
from fedloom.models.introspection import Readout, readout


@dataclass(frozen=True)
class Prefix:
    """A beginning that was read."""

    parts: Readout
    cache: Any
    """Keys and values of one row."""
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
    from transformers import DynamicCache

    called: Any = model
    # Without the room that rows which are written one by one want.
    cache = DynamicCache(config=called.config.get_text_config(decoder=True))
    device = next(model.parameters()).device
    states = parts.hidden(input_ids=ids[None].to(device), use_cache=True, **{cache_name(): cache})
    return Prefix(parts, cache, states[0, -1])
