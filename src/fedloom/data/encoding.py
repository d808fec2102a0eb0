"""From stretches of text to token ids, whatever the tokenizer merges and whatever the data's text reads like."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

from fedloom.data.control import Added, Controls, Hidden, any_of, shown
from fedloom.data.formats import Message
from fedloom.data.prompts import Segment
from fedloom.data.rendering import Rendering
from fedloom.data.templates import ChatTemplate


class Tokenizer(ChatTemplate, Protocol):
    """What is needed of a Hugging Face tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """Return the id of the begin-of-sequence token."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """Return the id of the end-of-sequence token."""
        ...

    def __call__(
        self,
        text: list[str],
        *,
        add_special_tokens: bool,
        verbose: bool,
        split_special_tokens: bool | None = None,
    ) -> Mapping[str, Any]:
        """Return `input_ids`, a list of ids for every text; special tokens are letters where they are split."""
        ...

    def decode(self, token_ids: list[int]) -> Any:
        """Return the text of the ids."""
        ...


Pieces = list[list[int]]
"""The ids of each segment of a rendering."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer, and where the tokens that it reads before all others begin and end."""

    tokenizer: Tokenizer
    added: Mapping[str, tuple[int, Added]]
    """Text -> id and token."""
    border: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Encoder":
        """Return the encoder of a tokenizer."""
        added = {one.content: (at, one) for at, one in tokenizer.added_tokens_decoder.items()}
        return cls(tokenizer, added, any_of(added))

    def pieces(self, renderings: Sequence[Rendering]) -> Iterator[Pieces]:
        """Yield, for every rendering, the ids of each of its segments."""
        eos = self.tokenizer.eos_token or ""
        growing = [
            list(accumulate(segment.text + eos * segment.end for segment in rendering.segments))
            for rendering in renderings
        ]
        pairs = list(zip(renderings, growing, strict=True))
        flat = self.all_ids([(text, one.hidden) for one, texts in pairs for text in texts])
        for rendering, texts in pairs:
            pieces = _differences([next(flat) for _ in texts])
            if pieces is None or not self._ends_once(rendering.segments, pieces):
                pieces = self._apart(rendering.segments, rendering.hidden)
            yield pieces

    def all_ids(self, texts: Sequence[tuple[str, Hidden]]) -> Iterator[list[int]]:
        """Yield the ids of every text, those that hide nothing encoded at once."""
        plain = iter(self._ids([text for text, hidden in texts if not hidden]))
        for text, hidden in texts:
            yield self.ids(text, hidden) if hidden else next(plain)

    def ids(self, text: str, hidden: Hidden) -> list[int]:
        """Return the ids of a text in which characters of `hidden` stand for texts that are no tokens."""
        if not any(letter in hidden for letter in text):
            return self._ids([text])[0]
        ids: list[int] = []
        parts = self.border.split(text)
        run = ""
        for at, part in enumerate(parts):
            if at % 2 or not any(letter in hidden for letter in part):
                run += part  # every second one is a token
                continue
            before, after = parts[at - 1] if at else "", "".join(parts[at + 1 : at + 2])
            ids += self._ids([run])[0] if run else []
            ids += self._letters(self._stripped(part, before, after), before, hidden)
            run = ""
        return ids + (self._ids([run])[0] if run else [])

    def _stripped(self, part: str, before: str, after: str) -> str:
        """Return the stretch between two tokens without the white space they take in."""
        if before and self.added[before][1].rstrip:
            part = part.lstrip()
        return part.rstrip() if after and self.added[after][1].lstrip else part

    def _letters(self, part: str, before: str, hidden: Hidden) -> list[int]:
        """Return the ids of a stretch between two tokens, none of them what a hidden text would be as a token."""
        unwanted = {self.added[hidden[letter]][0] for letter in part if letter in hidden}
        whole = shown(part, hidden)
        for split in (None, True):
            ids = self._behind(before, whole, split=split)
            if unwanted.isdisjoint(ids):
                return ids
        # A vocabulary that knows the text as one of its words: it is cut within.
        pieces = [""]
        for letter in part:
            text = hidden.get(letter, "")
            pieces[-1] += text[:1] or letter
            pieces += [text[1:]] if text else []
        first, *others = pieces
        return sum(
            (self._anchored(piece) for piece in others if piece), self._behind(before, first)
        )

    def _behind(self, before: str, text: str, split: bool | None = None) -> list[int]:
        """Return the ids of a text that follows the token `before`, or nothing."""
        if before:
            joined, token, alone = self._ids([f"{before}a", before, "a"])
            if joined != token + alone:
                return self._anchored(text, split)
        return self._ids([text], split)[0]

    def _anchored(self, text: str, split: bool | None = None) -> list[int]:
        """Return the ids of a text inside another.

        Behind a line break, which is cut off again: a vocabulary that puts a space in front of every text
        (SentencePiece) would otherwise put one inside this one.
        """
        anchor, behind, alone = self._ids(["\n", f"\n{text}", text], split)
        return behind[len(anchor) :] if behind[: len(anchor)] == anchor else alone

    def _apart(self, segments: Sequence[Segment], hidden: Hidden) -> Pieces:
        """Encode every segment by itself."""
        texts = [segment.text for segment in segments]
        inside = ["\n", *(f"\n{text}" for text in texts)]
        anchor, *behind = self.all_ids([(text, hidden) for text in inside])
        alone = list(self.all_ids([(text, hidden) for text in texts]))
        pieces = [
            ids[len(anchor) :] if first_or_merged and ids[: len(anchor)] == anchor else plain
            for first_or_merged, ids, plain in zip(
                [False, *[True] * (len(segments) - 1)], behind, alone, strict=True
            )
        ]
        end = self.tokenizer.eos_token_id
        assert end is not None  # make_render refused a tokenizer without
        return [ids + [end] * segment.end for ids, segment in zip(pieces, segments, strict=True)]

    def _ends_once(self, segments: Sequence[Segment], pieces: Pieces) -> bool:
        """Return whether every answer ends in exactly one end token."""
        end = self.tokenizer.eos_token_id
        return all(
            ids[-1:] == [end] and ids[-2:] != [end, end]
            for segment, ids in zip(segments, pieces, strict=True)
            if segment.end
        )

    def _ids(self, texts: list[str], split: bool | None = None) -> Pieces:
        if not texts:
            return []
        # Only where it matters: not every tokenizer knows the word.
        if split is None:
            encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        else:
            encoded = self.tokenizer(
                texts, add_special_tokens=False, verbose=False, split_special_tokens=split
            )
        ids: Pieces = encoded["input_ids"]
        return ids


def lengths(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Return the number of tokens of every text, as text."""
    controls, encoder = Controls.of(tokenizer), Encoder.of(tokenizer)
    hidden = [controls.hide([Message("user", text)]) for text in texts]
    return [len(ids) for ids in encoder.all_ids([(one.content, of) for (one,), of in hidden])]


def _differences(wholes: Pieces) -> Pieces | None:
    """Return what each prefix adds to the one before; None where one is not a prefix of the next."""
    pieces = wholes[:1]
    for shorter, longer in pairwise(wholes):
        if longer[: len(shorter)] != shorter:
            return None
        pieces.append(longer[len(shorter) :])
    return pieces
