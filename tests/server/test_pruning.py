"""Ranks that clients give up, by hand."""

import pytest
import torch

from fedloom.core.protocols import Tail
from fedloom.server.factors.pruning import RankPruning, tail_size, without_tail

A, B = "layers.0.lora_A.weight", "layers.0.lora_B.weight"
A1, B1 = "layers.1.lora_A.weight", "layers.1.lora_B.weight"
AND = {A1: torch.ones(3, 4), B1: torch.zeros(2, 3)}
"""A layer whose B is zero."""


def space(scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Return a layer whose tails from column 2 are (3, 4) and twice (2, 0, 0, 0), and one that adds nothing."""
    a = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [2, 0, 0, 0]])
    b = torch.tensor([[1.0, 1, 3 * scale], [1, 1, 4 * scale]])
    return {A: a, B: b, **AND, "norm.weight": torch.ones(5)}


def test_a_tail_is_as_large_as_its_factors_norms_multiplied() -> None:
    assert tail_size(space(), 2, 3) == 5 * 2
    assert tail_size(space(), 1, 3) == pytest.approx(27**0.5 * 8**0.5)
    assert tail_size(AND, 0, 3) == 0


@pytest.mark.parametrize(
    ("gamma", "least", "rank", "kept"),
    [
        (0.99, 1, 16, 15),
        (0.5, 1, 5, 2),
        (0.5, 1, 1, 1),
        (0.5, 4, 5, 4),
        (0.5, 4, 3, 3),
        (0.99, 1, 200, 198),
    ],
)
def test_a_share_is_kept_and_no_less_than_the_least(gamma, least, rank, kept) -> None:
    prune = RankPruning(gamma, 0.1, least)
    assert prune.kept(rank) == kept
    tail = prune.tail(space(), rank)
    wanted = Tail(0.1, ((A, B), (A1, B1)), kept, rank)
    assert tail == (wanted if kept < rank else None)


def test_columns_go_where_training_made_them_smaller_and_only_there() -> None:
    prune = RankPruning(0.7)
    assert prune.after(space(), space(0.9), 3) == 2
    assert prune.after(space(), space(1.1), 3) == 3
    assert prune.after(space(), space(), 3) == 3
    assert RankPruning(0.7, least=3).after(space(), space(0.9), 3) == 3
    fresh = {**space(), B: torch.zeros(2, 3)}
    assert prune.after(fresh, space(), 3) == 3, "an adapter that has only begun"


def test_what_is_given_up_is_sent_as_zeros() -> None:
    delta = space()
    sent = without_tail(delta, 2)
    assert torch.equal(sent[A][:2], delta[A][:2])
    assert not sent[A][2:].any()
    assert torch.equal(sent[B][:, :2], delta[B][:, :2])
    assert not sent[B][:, 2:].any()
    assert sent["norm.weight"] is delta["norm.weight"]
    assert delta[A][2:].any(), "an argument is not written to"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gamma": 1.0}, "fedlora.prune.gamma must be above 0 and below 1, got 1.0"),
        ({"gamma": float("nan")}, "fedlora.prune.gamma must be above 0"),
        ({"strength": -1.0}, "fedlora.prune.strength must be a number from 0, got -1.0"),
        ({"least": 0}, "fedlora.prune.least must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, said) -> None:
    with pytest.raises(ValueError, match=said):
        RankPruning(**settings)
