"""Join examples into full rows, so that short ones waste no padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

from fedloom.data.tokens import Example


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Return rows of up to `max_length` tokens, each of whole examples.

    Best fit, longest first. Positions start again at every example, by which attention can keep them apart, and
    the first token of each has no label, so nothing is predicted from another example.
    """
    rows: list[list[Example]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        length = len(example.ids)
        at = bisect_left(free, (length, -1))
        if at < len(free):
            left, row = free.pop(at)
        else:
            left, row = max_length, len(rows)
            rows.append([])
        rows[row].append(example)
        insort(free, (left - length, row))
    return [_row(row) for row in rows]


def _row(examples: Sequence[Example]) -> Example:
    return Example(
        ids=torch.cat([example.ids for example in examples]),
        labels=torch.cat([example.labels for example in examples]),
        prompt_length=0,
        positions=torch.cat([torch.arange(len(example.ids)) for example in examples]),
        choices=examples[0].choices,
    )
