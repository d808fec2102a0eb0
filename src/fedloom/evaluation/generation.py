"""Answers of the model's own: written greedily or drawn, with a cache."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fedloom.core.randomness import derive
from fedloom.data.tokens import Example
from fedloom.models.generation import write_greedily, write_sampled
from fedloom.models.positions import positions_of
from fedloom.models.prefix import LEAST, Prefix, read_prefix, shared_beginning
from fedloom.models.probe import keeps_padding_out


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
class Sampling:
    """Answers are drawn."""

    temperature: float
    """Above 0; 1 is the model's own distribution."""
    seed: int
    """Of the draws; they follow from it and from what is asked together."""


@dataclass(frozen=True, slots=True)
class Generation:
    """How answers are written: greedily or drawn, with a cache, up to a stop token."""

    tokenizer: Decoder
    max_new_tokens: int
    batch_size: int
    sampling: Sampling | None = None
    """None: the most likely token each time."""
    told: Callable[[str], object] | None = None
    """Called with an answer so far, before every further token of a greedy one that is asked alone."""
    stops: Sequence[str] = ()
    """Texts that end an answer: it is cut before the first of them, and a greedy one goes on no farther."""
    strip: bool = True
    """Whether white space around an answer is left out; otherwise it stands as it does behind the prompt."""
    share: bool = True
    """Whether what all prompts begin with is read once."""

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
        begin = self._begin(model, prompts)
        for chosen in batches([len(p) for p in prompts], self.batch_size, padded=padded):
            written, sound = self._write(
                [prompts[at] for at in chosen], model, stops, begin, chosen[0]
            )
            for at, ids, numbered in zip(chosen, written, sound, strict=True):
                length = next((n for n, token in enumerate(ids) if token in stops), len(ids))
                if numbered < min(length + 1, len(ids)):
                    answers[at] = ""
                    continue
                answers[at] = cut(self._text(ids[:length], prompts[at]), self.stops)
        return [answers[at] for at in range(len(prompts))]

    def _begin(self, model: nn.Module, prompts: Sequence[Tensor]) -> Prefix | None:
        """Return what all prompts begin with, read, if that saves anything."""
        if not self.share or len(prompts) < 2:
            return None
        shared = shared_beginning(prompts)
        return read_prefix(model, shared) if len(shared) >= LEAST else None

    def _write(
        self,
        prompts: Sequence[Tensor],
        model: nn.Module,
        stops: list[int],
        begin: Prefix | None,
        first: int,
    ) -> tuple[list[list[int]], list[int]]:
        device = next(model.parameters()).device
        pad = self.tokenizer.pad_token_id
        fill = stops[0] if pad is None and stops else pad or 0
        ids = _pad_left(prompts, fill).to(device)
        mask = _pad_left([torch.ones_like(prompt) for prompt in prompts], 0).to(device)
        how: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "ends": stops,
            "fill": fill,
            "begin": begin,
        }
        if self.sampling is None:
            told = None if self.told is None else partial(self._tell, stops)
            over = self._is_over if self.stops else None
            written, sound = write_greedily(
                cast(Any, model), ids, mask, **how, told=told, over=over
            )
        else:
            temperature, seed = self.sampling.temperature, derive(self.sampling.seed, first)
            written, sound = write_sampled(
                cast(Any, model), ids, mask, **how, temperature=temperature, seed=seed
            )
        return written.tolist(), sound.tolist()

    def _text(self, ids: Sequence[int], prompt: Tensor) -> str:
        own = self._decoded(ids)
        if self.strip:
            return own.strip()
        # Alone, some tokenizers leave out the space that a text begins with.
        before, whole = self._decoded(prompt.tolist()), self._decoded([*prompt.tolist(), *ids])
        return whole[len(before) :] if whole.startswith(before) else own

    def _is_over(self, ids: Sequence[int]) -> bool:
        text = self._decoded(ids)
        text = text.strip() if self.strip else text
        return len(cut(text, self.stops)) < len(text)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode([*ids], skip_special_tokens=True))

    def _tell(self, stops: list[int], written: Tensor) -> None:
        assert self.told is not None
        ids = [token for token in written[0].tolist() if token not in stops]
        self.told(self._decoded(ids).strip())

    def _check_room(self, model: _Generates, longest: int) -> None:
        places = positions_of(model.config)
        if places is not None and longest + self.max_new_tokens > places:
            raise ValueError(
                f"evaluation.max_new_tokens must be at most {places - longest} for prompts of "
                f"{longest} tokens in a model of {places} positions, got {self.max_new_tokens}"
            )


def cut(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the texts that end it."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


def batches(lengths: Sequence[int], batch_size: int, *, padded: bool) -> Iterator[Sequence[int]]:
    """Yield places of prompts, longest first; where padding would be read, prompts of one length at a time."""
    order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    runs = [order]
    if not padded:
        runs = [list(run) for _, run in groupby(order, key=lambda at: lengths[at])]
    for run in runs:
        for start in range(0, len(run), batch_size):
            yield run[start : start + batch_size]


def turn_ends(tokenizer: Decoder, examples: Sequence[Example]) -> set[int]:
    """Return what a chat template ends a turn with, where that is not the end token: learnt right before it."""
    end = tokenizer.eos_token_id
    tails = {tuple(example.labels[-2:].tolist()) for example in examples}
    learnt = {before for before, *last in tails if last == [end] and before >= 0}
    # Text is left of what is no special token.
    return {t for t in learnt if not tokenizer.decode([t], skip_special_tokens=True)}


def _stops(tokenizer: Decoder, model: _Generates) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, and a chat model's own."""
    own: int | list[int] | None = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({stop for stop in (tokenizer.eos_token_id, *listed) if stop is not None})


def _pad_left(rows: Sequence[Tensor], fill: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=fill, padding_side="left"
    )
