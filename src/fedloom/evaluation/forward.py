"""The two passes of an evaluation: loss of given answers, and answers of the model's own."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloom.data.classes import decide
from fedloom.data.tokens import Example
from fedloom.models.generation import write_greedily
from fedloom.models.positions import positions_of
from fedloom.models.probe import keeps_padding_out

NOTHING = -1


class Decoder(Protocol):
    """What evaluation needs of a tokenizer."""

    @property
    def eos_token_id(self) -> int | None:
        """Return the token that ends an answer."""
        ...

    @property
    def pad_token_id(self) -> int | None:
        """Return the token that fills a batch."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any:
        """Return the text of one answer."""
        ...


class _Generates(Protocol):
    config: Any
    generation_config: Any


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the target tokens of one example."""

    loss: float
    """Sum of the negative log-likelihoods, nats."""
    correct: int
    """Target tokens that are also the most likely ones."""
    num_tokens: int
    choice: int
    """The most likely one for the last target: a place among the classes, or a token; NOTHING where it is none."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation without gradients, and put every submodule back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: a buffer made lazily in there could not be trained with afterwards.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def score(
    model: nn.Module, examples: Sequence[Example], batch_size: int, classes: Sequence[int] = ()
) -> list[Score]:
    """Return the scores in the order of the examples; `classes` are the tokens a classifier decides between."""
    scores: dict[int, Score] = {}
    order = sorted(range(len(examples)), key=lambda at: -len(examples[at].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [examples[at] for at in chosen]
        scores.update(zip(chosen, _score(batch, model, classes), strict=True))
    return [scores[at] for at in range(len(examples))]


def _score(batch: Sequence[Example], model: nn.Module, classes: Sequence[int]) -> Iterator[Score]:
    device = next(model.parameters()).device
    ids = nn.utils.rnn.pad_sequence([example.ids for example in batch], batch_first=True)
    labels = nn.utils.rnn.pad_sequence(
        [example.labels for example in batch], batch_first=True, padding_value=-100
    )[:, 1:].to(device)
    # The right padding needs no mask under causal attention, and packed rows must not have one:
    # their borders are read off the restarting positions.
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": False}
    positions = [
        torch.arange(len(example.ids)) if example.positions is None else example.positions
        for example in batch
    ]
    if any(example.positions is not None for example in batch):
        inputs["position_ids"] = nn.utils.rnn.pad_sequence(positions, batch_first=True).to(device)
    logits = model(**inputs).logits[:, :-1]
    rows, columns = (labels != -100).nonzero(as_tuple=True)
    chosen, targets = logits[rows, columns].float(), labels[rows, columns]
    chosen, targets = decide(chosen, targets, classes)
    losses = functional.cross_entropy(chosen, targets, reduction="none").double()
    # Where a logit is NaN nothing is the most likely, whatever argmax says.
    best = chosen.argmax(-1).masked_fill(chosen.isnan().any(-1), NOTHING)
    hits = (best == targets).long()
    last = torch.zeros(len(batch), dtype=torch.long, device=device)
    last.scatter_reduce_(0, rows, torch.arange(len(rows), device=device), "amax")
    choices = best[last].tolist() if len(rows) else [0] * len(batch)
    zeros = torch.zeros(len(batch), device=device)
    loss = zeros.double().index_add(0, rows, losses).tolist()
    correct = zeros.long().index_add(0, rows, hits).tolist()
    for row, num_tokens in enumerate((labels != -100).sum(1).tolist()):
        yield Score(loss[row], correct[row], num_tokens, choices[row])


@dataclass(frozen=True, slots=True)
class Generation:
    """How answers are written: greedily, with a cache, up to a stop token."""

    tokenizer: Decoder
    max_new_tokens: int
    batch_size: int

    def answers(
        self, model: nn.Module, prompts: Sequence[Tensor], ends: Collection[int] = ()
    ) -> list[str]:
        """Return the answers in the order of the prompts; nothing where the model has no numbers for them.

        `ends` are tokens that end an answer besides the tokenizer's and the model's own.
        """
        writer = cast(_Generates, model)
        self._check_room(writer, max(len(prompt) for prompt in prompts))
        stops = sorted({*_stops(self.tokenizer, writer), *ends})
        answers: dict[int, str] = {}
        alike = len({len(prompt) for prompt in prompts}) == 1
        padded = alike or keeps_padding_out(model)
        for chosen in _batches(prompts, self.batch_size, padded=padded):
            written, sound = self._write([prompts[at] for at in chosen], model, stops)
            for at, ids, numbered in zip(chosen, written, sound, strict=True):
                length = next((n for n, token in enumerate(ids) if token in stops), len(ids))
                if numbered < min(length + 1, len(ids)):
                    answers[at] = ""
                    continue
                text = str(self.tokenizer.decode(ids[:length], skip_special_tokens=True))
                answers[at] = text.strip()
        return [answers[at] for at in range(len(prompts))]

    def _write(
        self, prompts: Sequence[Tensor], model: nn.Module, stops: list[int]
    ) -> tuple[list[list[int]], list[int]]:
        device = next(model.parameters()).device
        pad = self.tokenizer.pad_token_id
        fill = stops[0] if pad is None and stops else pad or 0
        mask = _pad_left([torch.ones_like(prompt) for prompt in prompts], 0)
        written, sound = write_greedily(
            cast(Any, model),
            _pad_left(prompts, fill).to(device),
            mask.to(device),
            max_new_tokens=self.max_new_tokens,
            ends=stops,
            fill=fill,
        )
        return written.tolist(), sound.tolist()

    def _check_room(self, model: _Generates, longest: int) -> None:
        places = positions_of(model.config)
        if places is not None and longest + self.max_new_tokens > places:
            raise ValueError(
                f"evaluation.max_new_tokens must be at most {places - longest} for prompts of "
                f"{longest} tokens in a model of {places} positions, got {self.max_new_tokens}"
            )


def _batches(
    prompts: Sequence[Tensor], batch_size: int, *, padded: bool
) -> Iterator[Sequence[int]]:
    """Yield places of prompts, longest first; where padding would be read, prompts of one length at a time."""
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
    runs = [order]
    if not padded:
        runs = [list(run) for _, run in groupby(order, key=lambda at: len(prompts[at]))]
    for run in runs:
        for start in range(0, len(run), batch_size):
            yield run[start : start + batch_size]


def _stops(tokenizer: Decoder, model: _Generates) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, and a chat model's own."""
    own: int | list[int] | None = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({stop for stop in (tokenizer.eos_token_id, *listed) if stop is not None})


def _pad_left(rows: Sequence[Tensor], fill: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=fill, padding_side="left"
    )
