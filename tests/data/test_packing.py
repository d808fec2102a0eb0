"""Packed rows are full, whole and keep their examples apart."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.data.packing import pack
from fedloom.data.tokens import IGNORED, Example


def example(length: int, mark: int = 1) -> Example:
    ids = torch.full((length,), mark)
    labels = ids.clone()
    labels[0] = IGNORED
    return Example(ids, labels, prompt_length=1)


def test_rows_hold_whole_examples_with_positions_from_zero_and_labels_intact():
    rows = pack([example(3, 1), example(5, 2), example(2, 3), example(6, 4)], 8)
    assert [row.ids.tolist() for row in rows] == [[4] * 6 + [3] * 2, [2] * 5 + [1] * 3]
    first, second = rows
    assert first.positions is not None
    assert first.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert first.labels.tolist() == [IGNORED, 4, 4, 4, 4, 4, IGNORED, 3]
    assert second.labels.tolist() == [IGNORED, 2, 2, 2, 2, IGNORED, 1, 1]
    assert (first.prompt_length, first.record) == (0, None)


@given(st.lists(st.integers(2, 32), max_size=60))
def test_nothing_is_lost_and_no_row_is_too_long(lengths: list[int]):
    rows = pack([example(length, mark) for mark, length in enumerate(lengths)], 32)
    assert sum(len(row.ids) for row in rows) == sum(lengths)
    assert sum(row.num_targets for row in rows) == sum(length - 1 for length in lengths)
    for row in rows:
        assert row.positions is not None
        assert len(row.ids) == len(row.labels) == len(row.positions) <= 32
        starts = row.positions == 0
        assert (row.labels[starts] == IGNORED).all(), "nothing is predicted from another example"
        for mark in row.ids.unique().tolist():
            assert int((row.ids == mark).sum()) == lengths[mark], "examples are whole"


@given(st.lists(st.integers(2, 32), min_size=2, max_size=60))
def test_at_most_one_row_is_half_empty(lengths: list[int]):
    rows = pack([example(length) for length in lengths], 32)
    assert sum(len(row.ids) <= 16 for row in rows) <= 1
