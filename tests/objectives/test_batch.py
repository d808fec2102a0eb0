import pytest
import torch

from fedloom.data.tokens import IGNORED, Example
from fedloom.objectives.batch import Batch, collate

LIKE = torch.zeros((), dtype=torch.float64)


def row(length: int, at: int = 0) -> Example:
    ids = torch.arange(at, at + length)
    labels = ids.clone()
    labels[0] = IGNORED
    return Example(ids, labels, 1)


def asked(batch: Batch) -> list[tuple[int, int]]:
    """Return the tokens that are asked for, each with the one before it."""
    return sorted(
        (int(here), int(label))
        for ids, labels in zip(batch.ids, batch.labels, strict=True)
        for here, label in zip(ids, labels, strict=True)
        if label != IGNORED
    )


def test_rows_are_padded_on_the_right_and_ask_for_the_next_token():
    batch = collate([[row(3, 10), row(2, 20)]], [3], LIKE, pack=False)
    assert batch.ids.tolist() == [[10, 11, 12], [20, 21, 0]]
    assert batch.labels.tolist() == [[11, 12, IGNORED], [21, IGNORED, IGNORED]]
    assert batch.positions is None
    assert batch.weights.tolist() == [1 / 3]


def test_a_lane_with_fewer_rows_is_filled_up_with_rows_that_ask_for_nothing():
    batch = collate([[row(3)], [row(2, 20), row(2, 30)]], [2, 2], LIKE, pack=False)
    assert batch.ids.shape == (4, 3)
    assert (batch.labels[1] == IGNORED).all()
    losses = torch.ones(3, dtype=torch.float64)
    at = (batch.labels.flatten() != IGNORED).nonzero().squeeze(1)
    assert len(at) == 4
    assert batch.per_lane(losses, at[:3]).tolist() == [1.0, 0.5]


def test_short_rows_share_a_row_where_that_is_less_work():
    lanes = [[row(20), row(4, 30), row(5, 40), row(6, 50)], [row(7, 60), row(8, 70), row(9, 80)]]
    apart = collate(lanes, [1, 1], LIKE, pack=False)
    shared = collate(lanes, [1, 1], LIKE, pack=True)
    assert shared.ids.numel() < 0.7 * apart.ids.numel()
    assert asked(shared) == asked(apart)
    assert shared.positions is not None
    starts = (shared.positions == 0) & (shared.ids != 0)
    assert set(shared.ids[starts].tolist()) >= {30, 40, 50, 60, 70, 80}


@pytest.mark.parametrize("lanes", [[[row(8), row(8)]], [[row(8)], [row(7)]]])
def test_rows_of_one_length_stay_apart_where_sharing_saves_nothing(lanes):
    assert collate(lanes, [1] * len(lanes), LIKE, pack=True).positions is None


def test_packed_rows_keep_their_positions():
    packed = Example(torch.arange(5), torch.arange(5), 0, positions=torch.tensor([0, 1, 2, 0, 1]))
    batch = collate([[packed, row(3)]], [1], LIKE, pack=False)
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]
