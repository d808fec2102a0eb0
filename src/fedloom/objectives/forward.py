"""A model called for what a batch asks: hidden states everywhere, logits only where a next token is asked for."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedloom.models.introspection import Readout, readout, vocabulary
from fedloom.objectives.batch import Batch
from fedloom.objectives.head import Product, chunk_rows, fused_cross_entropy

NOTHING = -1
"""In the place of the most likely token, where a logit is NaN."""
LOGITS_BYTES = 2**30
"""What the logits of one call may take where they are made everywhere and no gradient is kept."""
CPU_TOKENS = 1024
"""Of one call without gradients on a CPU: what stands between two products of more tokens no longer fits its caches."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model makes of the tokens asked for, (n,) each."""

    at: Tensor
    """Flat places in the batch."""
    losses: Tensor
    """Negative log-likelihoods, nats, float64."""
    best: Tensor
    """The most likely token, or its place among the choices; NOTHING where a logit is NaN."""
    hits: Tensor
    """Whether that is the token asked for."""


@dataclass(frozen=True, slots=True)
class Forward:
    """The one way from a batch to likelihoods, in training and evaluation."""

    model: nn.Module
    parts: Readout | None = None
    """The model in two; None: its own forward, with logits everywhere."""
    product: Product | None = None
    """Of a head that neither learns nor moves: loss and derivative are one function, and no logit outlives it."""
    low: bool = False
    """Whether matrix products are in bfloat16, under autocast."""
    times: int = 1
    """How many times as many rows of logits as usual are made at once, where that product is slow at few."""

    @classmethod
    def of(cls, model: nn.Module) -> "Forward":
        """Return the forward of a model as it stands, in two parts where it can be split."""
        return cls(model, readout(model))

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the negative log-likelihoods (n,) of the tokens asked for, with a graph, and their flat places (n,)."""
        with self._precision():
            at, targets = batch.asked()
            states = self._states(batch.inputs(), at)
            frozen = None if self.parts is None else self.parts.frozen
            whole = frozen is not None and self.product is not None and batch.choices is None
            if whole and not _autocasting(states):
                assert frozen is not None
                assert self.product is not None
                losses = fused_cross_entropy(
                    states, self.product, frozen.bias, targets, times=self.times
                )
                return losses, at
            found = [
                nn.functional.cross_entropy(logits, wanted, reduction="none")
                for logits, wanted in self._each(states, targets, batch.choices)
            ]
            return torch.cat(found), at

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits (n, vocabulary) behind the tokens asked for, with a graph."""
        with self._precision():
            return self._head(self._states(batch.inputs(), batch.asked()[0]))

    @torch.no_grad()
    def predictions(self, batch: Batch) -> Predictions:
        """Return the likelihoods of the tokens asked for, and the most likely ones."""
        with self._precision():
            at, targets = batch.asked()
            states = self._states(batch.inputs(), at)
            losses, bests, hits = [], [], []
            for logits, wanted in self._each(states, targets, batch.choices):
                losses.append(nn.functional.cross_entropy(logits, wanted, reduction="none"))
                # The largest of a row with NaN is NaN, whatever its place.
                largest, best = logits.max(1)
                bests.append(best.masked_fill(largest.isnan(), NOTHING))
                hits.append(bests[-1] == wanted)
        return Predictions(at, torch.cat(losses).double(), torch.cat(bests), torch.cat(hits))

    @torch.no_grad()
    def entropies(self, inputs: Mapping[str, Tensor], at: Tensor) -> Tensor:
        """Return the entropies (n,) of the token behind each flat place (n,), nats."""
        with self._precision():
            states = self._states(inputs, at)
            found = []
            for some in torch.split(states, self._rows(states)):
                chances = self._head(some).log_softmax(1).exp_()
                found.append(torch.special.entr(chances).sum(1))
        return torch.cat(found)

    def most_rows(self, length: int) -> int:
        """Return how many rows of a length, without gradients, may go through at once."""
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        tokens = CPU_TOKENS if on_cpu else 2**31
        if self.parts is None:
            tokens = min(tokens, LOGITS_BYTES // (4 * vocabulary(self.model)))
        return max(1, tokens // length)

    def _states(self, inputs: Mapping[str, Tensor], at: Tensor) -> Tensor:
        """Return what the head makes logits of, (n, width), or those logits themselves."""
        if self.parts is not None:
            return self.parts.hidden(**inputs, use_cache=False).flatten(0, 1).index_select(0, at)
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits.flatten(0, 1).index_select(0, at)

    def _each(
        self, states: Tensor, targets: Tensor, choices: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits (some, vocabulary or choices) and targets (some,) among them."""
        rows = self._rows(states)
        for some, wanted in zip(torch.split(states, rows), torch.split(targets, rows), strict=True):
            yield among(self._head(some), wanted, choices)

    def _head(self, states: Tensor) -> Tensor:
        logits: Tensor = states if self.parts is None else self.parts.head(states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _rows(self, states: Tensor) -> int:
        # Without a gradient nothing is kept of the logits, so a few rows of them at a time will do.
        learning = torch.is_grad_enabled()
        return max(len(states) if learning else chunk_rows(states, learning=False), 1)

    def _precision(self) -> AbstractContextManager[object]:
        if not self.low:
            return nullcontext()
        # The cache keeps low copies of weights for backward passes; without those it only takes memory.
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, cache_enabled=torch.is_grad_enabled())


def among(logits: Tensor, targets: Tensor, choices: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (n, choices) logits of the choices alone and (n,) targets among them; all as they are without choices.

    Args:
        logits: (n, vocabulary) where a choice is asked for.
        targets: (n,) tokens, each one of `choices`.
        choices: (choices,) tokens.
    """
    if choices is None:
        return logits, targets
    return logits.index_select(1, choices), (targets[:, None] == choices).int().argmax(1)


def _autocasting(like: Tensor) -> bool:
    return torch.is_autocast_enabled(like.device.type)
