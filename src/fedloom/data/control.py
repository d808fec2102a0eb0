"""Text of the data that reads like a control token: it is text, for only the template writes control tokens.

While a conversation is written, a character that occurs nowhere in it stands for each such text, so that templates
trim and split as ever and the control tokens found in what they wrote are theirs.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fedloom.data.formats import Message
from fedloom.data.tools import ToolUse

Hidden = Mapping[str, str]
"""The character that stands for a text -> the text."""

_PRIVATE = range(0xF0000, 0x10FFFE)
"""Characters that no alphabet has, which templates take for letters."""


class Added(Protocol):
    """What is known of a token that a tokenizer reads from a text before all others."""

    @property
    def content(self) -> str:
        """Return its text."""
        ...

    @property
    def special(self) -> bool:
        """Return whether it is no text."""
        ...

    @property
    def lstrip(self) -> bool:
        """Return whether it takes the white space before it in."""
        ...

    @property
    def rstrip(self) -> bool:
        """Return whether it takes the white space behind it in."""
        ...


class Vocabulary(Protocol):
    """What of a tokenizer tells its control tokens."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Added]:
        """Return the tokens that are read from a text before all others."""
        ...

    @property
    def all_special_ids(self) -> list[int]:
        """Return the ids that are not text."""
        ...


@dataclass(frozen=True, slots=True)
class Controls:
    """The texts of a tokenizer's control tokens."""

    texts: Mapping[str, int]
    """Text -> its place among them."""
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, vocabulary: Vocabulary, written: str = "") -> "Controls":
        """Return the special tokens, and the added ones that `written`, what a template writes itself, marks turns with.

        White space and words are text, whatever a tokenizer or a template makes of them.
        """
        special = set(vocabulary.all_special_ids)
        texts = [
            token.content
            for at, token in vocabulary.added_tokens_decoder.items()
            if token.content.strip()
            and (token.special or at in special or _marks(token.content, written))
        ]
        return cls({text: at for at, text in enumerate(texts)}, any_of(texts))

    def hide(self, messages: Sequence[Message]) -> tuple[tuple[Message, ...], Hidden]:
        """Return the messages with a character for every control token's text, and what each stands for."""
        if not any(self.pattern.search(message.content) for message in messages):
            return tuple(messages), {}
        first = self._free({letter for message in messages for letter in message.content})
        hidden: dict[str, str] = {}

        def stand_in(found: re.Match[str]) -> str:
            # The same for a text in every conversation, so that a part of one is written as in the whole.
            letter = chr(first + self.texts[found[0]])
            hidden[letter] = found[0]
            return letter

        shown = []
        for message in messages:
            head = message.content.removesuffix(message.context)
            behind = self.pattern.sub(stand_in, message.context)
            content = self.pattern.sub(stand_in, head) + behind
            use = message.use and _hidden(
                message.use, lambda text: self.pattern.sub(stand_in, text)
            )
            shown.append(replace(message, content=content, context=behind, use=use))
        return tuple(shown), hidden

    def _free(self, taken: set[str]) -> int:
        step = len(self.texts)
        for first in range(_PRIVATE.start, _PRIVATE.stop - step, step):
            if not any(first <= ord(letter) < first + step for letter in taken):
                return first
        raise ValueError("a conversation has letters of every private area of Unicode")


def _hidden(use: ToolUse, hide: Callable[[str], str]) -> ToolUse:
    calls = (replace(one, name=hide(one.name), arguments=hide(one.arguments)) for one in use.calls)
    results = (replace(one, content=hide(one.content)) for one in use.results)
    return ToolUse(hide(use.said), tuple(calls), tuple(results))


def _marks(text: str, written: str) -> bool:
    return text in written and not text.isalnum() and any(letter.isalpha() for letter in text)


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return what finds any of the texts, the longest first, as one group."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest)) or '(?!)'})")


def shown(text: str, hidden: Hidden) -> str:
    """Return the text as it was before it was hidden."""
    return "".join(hidden.get(letter, letter) for letter in text) if hidden else text
