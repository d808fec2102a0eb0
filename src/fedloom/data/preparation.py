"""What becomes of rows before it is known who holds them: an objective's part of the data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.formats import Conversations, Message, Record, to_records
from fedloom.data.readers import Row
from fedloom.data.targets import posed
from fedloom.data.tokens import Example, Tokenised, tokenise


class Preparation(Protocol):
    """What a data set asks of an objective."""

    @property
    def classes(self) -> Mapping[str, str]:
        """Return each answer that occurs in rows -> the word the model decides for; empty where answers are text."""
        ...

    def records(self, rows: Sequence[Row], settings: DataSettings) -> Conversations:
        """Return the conversations of rows, with the answers that are learnt."""
        ...

    def examples(
        self, records: Sequence[Record], settings: DataSettings, tokenizer: Tokenizer
    ) -> Tokenised:
        """Return the examples of every conversation."""
        ...


@runtime_checkable
class Joining(Protocol):
    """An objective that looks at several examples of one client together."""

    def joined(self, examples: Sequence[Example], settings: DataSettings) -> list[Example]:
        """Return the examples of one split of one client, with what each takes from the others."""
        ...


@dataclass(frozen=True, slots=True)
class Supervised:
    """Every token of an answer that is learnt is a target."""

    @property
    def classes(self) -> Mapping[str, str]:
        """Return nothing: answers are text."""
        return {}

    def records(self, rows: Sequence[Row], settings: DataSettings) -> Conversations:
        """Return the conversations as the rows have them."""
        return to_records(rows, settings)

    def examples(
        self, records: Sequence[Record], settings: DataSettings, tokenizer: Tokenizer
    ) -> Tokenised:
        """Return the examples of every conversation."""
        return tokenise(records, settings, tokenizer)


SUPERVISED = Supervised()
"""Of data whose objective is not named."""


def question(messages: Sequence[Message], settings: DataSettings, objective: Preparation) -> Record:
    """Return the conversation to be answered; where answers are classes, any of them stands in for the answer."""
    return posed(messages, settings, next(iter(objective.classes.values()), "?"))
