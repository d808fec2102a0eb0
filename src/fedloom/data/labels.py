"""Which labels are written down and sent as they are: those with few and short values. Of others, a count and a hash.

Any column can be a label. One called `topic` may hold a name each row, or a sentence about a patient: text that must
not stand in a manifest, a report or a message only because of what its column is called.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fedloom.data.names import fingerprint, is_name
from fedloom.data.sharding import Labels

MOST_VALUES = 64
LONGEST = 40
"""Characters of a value."""
ROWS_A_VALUE = 2


@dataclass(frozen=True, slots=True)
class HiddenLabel:
    """What is told of a label whose values are not."""

    num_values: int
    """In the whole federation."""
    sha256: str
    """Of the values and how many rows have each."""


def hidden_labels(
    labels: Sequence[Labels], *, named: str | None = None, known: Collection[str] = ()
) -> dict[str, HiddenLabel]:
    """Return the labels whose values are not told: all but those with few and short values.

    Few are at most 64 values, and on average at least 2 rows a value unless there is only one; short is a value of up
    to 40 characters that can name a client.

    Args:
        labels: Of every row of the federation.
        named: The label that clients are called by. Its values are shown as long as each can name one.
        known: Values that the recipe has in it, such as classes.
    """
    hidden = {}
    for name in labels[0] if labels else ():
        counts = Counter(of_row[name] for of_row in labels)
        shown = counts.keys() <= set(known) or (
            all(map(is_name, counts)) if name == named else _few_and_short(counts)
        )
        if not shown:
            text = json.dumps(sorted(counts.items())).encode()
            hidden[name] = HiddenLabel(len(counts), hashlib.sha256(text).hexdigest())
    return hidden


def shown_labels(labels: Labels, hidden: Collection[str]) -> dict[str, str]:
    """Return labels with a hash in the place of each hidden value, so that equal ones stay equal."""
    return {
        name: f"sha256:{fingerprint(value)}" if name in hidden else value
        for name, value in labels.items()
    }


def _few_and_short(counts: Mapping[str, int]) -> bool:
    rows = sum(counts.values())
    few = len(counts) <= MOST_VALUES and (len(counts) == 1 or rows >= ROWS_A_VALUE * len(counts))
    return few and all(len(value) <= LONGEST and is_name(value) for value in counts)
