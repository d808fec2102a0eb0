"""Rows that are equal: how often, and how much of what is measured is learnt as well."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedloom.core.protocols import ClientId
from fedloom.data.formats import Record
from fedloom.data.splits import Cut


@dataclass(frozen=True, slots=True)
class Leak:
    """How much of the validation or test rows of all clients is learnt too."""

    num_rows: int
    num_learnt: int
    """Of them, those whose conversation is in the training data of some client."""
    num_elsewhere: int
    """Of those, the ones that only other clients learn."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What is there more than once."""

    num_rows: int = 0
    """Rows whose conversation an earlier row has."""
    dropped: bool = False
    """Whether they are left out."""
    num_shared: int = 0
    """Conversations that more than one client learns."""
    leaks: Mapping[str, Leak] = field(default_factory=dict)
    """By split: validation and test."""

    def lines(self) -> list[str]:
        """Return a line for each kind there is."""
        lines = []
        if self.num_rows:
            fate = "left out" if self.dropped else "kept (data.duplicates drop leaves them out)"
            lines.append(f"{self.num_rows:,} rows repeat an earlier one, {fate}")
        for split, leak in self.leaks.items():
            if leak.num_learnt:
                lines.append(
                    f"{leak.num_learnt:,} of {leak.num_rows:,} {split} rows are also learnt, "
                    f"{leak.num_elsewhere:,} of them by other clients only"
                )
        if self.num_shared:
            lines.append(f"{self.num_shared:,} conversations are learnt by more than one client")
        return lines


def conversation(record: Record) -> str:
    """Return the hash of what is said in a record; equal conversations have equal ones."""
    turns = [[message.role, message.content] for message in record.messages]
    turns += [["rejected", record.rejected]] if record.rejected else []
    turns += [["tools", record.tools]] if record.tools else []
    turns += [] if record.good is None else [["good", str(record.good)]]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


_RANKS = {"test": 0, "validation": 1}


def first_of_each(hashes: Sequence[str], records: Sequence[Record] = ()) -> list[int]:
    """Return where each conversation is for the first time, in order; one that is measured goes before those learnt.

    Args:
        hashes: Of each record, its conversation.
        records: Those that come in splits, or are held out; none: all are alike.
    """

    def rank(index: int) -> int:
        record = records[index] if records else None
        if record is None:
            return 2
        return 0 if record.held_out else _RANKS.get(record.split, 2)

    first: dict[str, int] = {}
    for index, each in sorted(enumerate(hashes), key=lambda pair: rank(pair[0])):
        first.setdefault(each, index)
    return sorted(first.values())


def leaks(cuts: Mapping[ClientId, Cut], hashes: Sequence[str]) -> tuple[int, dict[str, Leak]]:
    """Return how many conversations several clients learn, and the leak of each split.

    Args:
        cuts: Indices of every client's rows.
        hashes: Of each row, its conversation.
    """
    learnt: dict[str, set[ClientId]] = {}
    for client, parts in cuts.items():
        for index in parts.train:
            learnt.setdefault(hashes[index], set()).add(client)
    held_out = {
        "validation": [(client, i) for client, parts in cuts.items() for i in parts.validation],
        "test": [(client, i) for client, parts in cuts.items() for i in parts.test],
    }
    found = {}
    for split, rows in held_out.items():
        by = [(client, learnt.get(hashes[i], set())) for client, i in rows]
        found[split] = Leak(
            num_rows=len(rows),
            num_learnt=sum(bool(clients) for _, clients in by),
            num_elsewhere=sum(bool(clients) and client not in clients for client, clients in by),
        )
    return sum(len(clients) > 1 for clients in learnt.values()), found
