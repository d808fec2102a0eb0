import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.core.payloads import NoReplies, mean_upload
from fedloom.core.protocols import Reply
from fedloom.server.combine import COMBINES, Combine, Mean
from fedloom.server.combine.bounded import CentredClip, GeometricMedian, NormBound
from fedloom.server.combine.chosen import Bulyan, Krum, MultiKrum
from fedloom.server.combine.products import inner_products, squared_distances
from fedloom.server.combine.robust import TooFew
from fedloom.server.combine.sorted import Median, TrimmedMean
from fedloom.server.combine.weights import krum_scores

HAND = [(1.0, 1.0), (1.1, 0.9), (0.9, 1.2), (1.0, 1.1), (-8.0, 9.0)]
RULES: dict[str, Combine] = {
    "mean": Mean(),
    "median": Median(),
    "trimmed_mean": TrimmedMean(0.25),
    "krum": Krum(2),
    "multi_krum": MultiKrum(2),
    "multi_krum of three": MultiKrum(1, 3),
    "bulyan": Bulyan(1),
    "geometric_median": GeometricMedian(),
    "centred_clip": CentredClip(2.0),
    "norm_bound": NormBound(1.5),
    "centred_clip by the median": CentredClip(),
    "norm_bound by the median": NormBound(),
}
ROBUST = {name: rule for name, rule in RULES.items() if name != "mean"}


def replies(
    vectors: Sequence[Sequence[float]] | np.ndarray[Any, Any], weights: Sequence[float] = ()
) -> list[Reply]:
    """Return a reply of client c00, c01, ... for each vector."""
    weights = weights or [1.0] * len(vectors)
    return [
        Reply(f"c{at:02}", {"delta": {"w": torch.tensor(vector, dtype=torch.float64)}}, weight)
        for at, (vector, weight) in enumerate(zip(vectors, weights, strict=True))
    ]


def combined(rule: Combine, given: Sequence[Reply]) -> tuple[np.ndarray[Any, Any], list[float]]:
    """Return the combined vector and every influence, by client."""
    start = {"w": torch.zeros_like(given[0].upload["delta"]["w"])}
    delta, told = rule.combine(start, iter(given))
    return delta["w"].numpy(), [told[f"influence/{reply.client}"] for reply in given if told]


def drawn(count: int, size: int = 6, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(count, size))


# --- rules written down plainly --------------------------------------------------------------------


def plain_scores(x: np.ndarray[Any, Any], attackers: int, among: Sequence[int]) -> dict[int, float]:
    scores = {}
    for i in among:
        far = sorted(float(((x[i] - x[j]) ** 2).sum()) for j in among if j != i)
        scores[i] = sum(far[: max(len(among) - attackers - 2, 1)])
    return scores


def plain_krum(x: np.ndarray[Any, Any], weights: Sequence[float]) -> np.ndarray[Any, Any]:
    scores = plain_scores(x, 2, range(len(x)))
    found: np.ndarray[Any, Any] = x[min(scores, key=lambda at: scores[at])]
    return found


def plain_multi_krum(x: np.ndarray[Any, Any], weights: Sequence[float]) -> np.ndarray[Any, Any]:
    scores = plain_scores(x, 2, range(len(x)))
    found: np.ndarray[Any, Any] = x[sorted(scores, key=lambda at: scores[at])[: len(x) - 2]].mean(0)
    return found


def plain_bulyan(x: np.ndarray[Any, Any], weights: Sequence[float]) -> np.ndarray[Any, Any]:
    left, taken = list(range(len(x))), list[int]()
    while len(taken) < len(x) - 2:
        scores = plain_scores(x, 1, left)
        best = min(left, key=lambda at: scores[at])
        taken.append(best)
        left.remove(best)
    chosen, out = x[taken], []
    for column in chosen.T:
        middle = np.median(column)
        nearest = sorted(column, key=lambda value: abs(value - middle))
        out.append(np.mean(nearest[: len(taken) - 2]))
    return np.array(out)


def plain_trimmed(x: np.ndarray[Any, Any], weights: Sequence[float]) -> np.ndarray[Any, Any]:
    drop = int(0.25 * len(x))
    return np.array([np.mean(sorted(column)[drop : len(x) - drop]) for column in x.T])


def plain_mean(x: np.ndarray[Any, Any], weights: Sequence[float]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = np.average(x, axis=0, weights=weights)
    return found


PLAIN: dict[str, Callable[[Any, Any], Any]] = {
    "mean": plain_mean,
    "median": lambda x, weights: np.median(x, axis=0),
    "trimmed_mean": plain_trimmed,
    "krum": plain_krum,
    "multi_krum": plain_multi_krum,
    "bulyan": plain_bulyan,
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("count", [7, 8, 13])
@pytest.mark.parametrize("seed", range(3))
def test_a_rule_is_what_it_is_when_written_down_plainly(name: str, count: int, seed: int) -> None:
    x = drawn(count, seed=seed) * (1 + 4 * (np.arange(count) % 5 == 0))[:, None]
    weights = [1.0 + at % 3 for at in range(count)]
    found, _ = combined(RULES[name], replies(x, weights))
    assert found == pytest.approx(PLAIN[name](x, weights), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_no_point_near_the_geometric_median_has_a_smaller_sum_of_distances(seed: int) -> None:
    x, weights = drawn(9, seed=seed), [1.0 + at % 3 for at in range(9)]
    found, _ = combined(GeometricMedian(), replies(x, weights))

    def total(point: np.ndarray[Any, Any]) -> float:
        return sum(
            w * float(np.linalg.norm(row - point)) for row, w in zip(x, weights, strict=True)
        )

    for step in drawn(40, seed=seed + 50):
        assert total(found) < total(found + 1e-3 * step)


def test_krum_of_the_hand_computed_points() -> None:
    x = torch.tensor(HAND, dtype=torch.float64)
    scores = krum_scores(
        squared_distances(inner_products({"w": x[0]}, [{"w": row} for row in x])), 1
    )
    assert scores.tolist() == pytest.approx([0.03, 0.07, 0.07, 0.03, 283.46])
    found, influence = combined(Krum(1), replies(HAND))
    assert found.tolist() == [1.0, 1.0], "of equal scores the first client's"
    assert influence == [1, 0, 0, 0, 0]
    found, influence = combined(MultiKrum(1, 2), replies(HAND))
    assert found.tolist() == pytest.approx([1.0, 1.05])
    assert influence == [1, 0, 0, 1, 0]


def test_ties_of_scores_go_by_the_clients_name_in_half_precision_too() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        given = [
            Reply(f"c{at}", {"delta": {"w": torch.tensor(x).to(dtype)}})
            for at, x in enumerate(HAND)
        ]
        delta, _ = Krum(1).combine({"w": torch.zeros(2)}, reversed(given))
        assert delta["w"].dtype == torch.float32
        assert delta["w"].tolist() == pytest.approx([1, 1], abs=0.11)


@pytest.mark.parametrize("name", ROBUST)
@given(order=st.permutations(range(8)), seed=st.integers(0, 3), equal=st.booleans())
@settings(max_examples=15, deadline=None)
def test_the_order_of_replies_changes_no_bit(
    name: str, order: Sequence[int], seed: int, equal: bool
) -> None:
    x = np.ones((8, 4)) if equal else drawn(8, 4, seed)
    weights = [1.0 + at % 3 for at in range(8)]
    straight = replies(x, weights)
    start = {"w": torch.zeros(4, dtype=torch.float64)}
    first, told = RULES[name].combine(start, straight)
    again, retold = RULES[name].combine(start, [straight[at] for at in order])
    assert torch.equal(first["w"], again["w"])
    assert told == retold


@pytest.mark.parametrize("name", ROBUST)
def test_equal_updates_come_out_as_they_are(name: str) -> None:
    found, _ = combined(RULES[name], replies(np.full((8, 3), 0.25)))
    assert found == pytest.approx([0.25] * 3)
    found, _ = combined(RULES[name], replies(np.zeros((8, 3))))
    assert found.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("bad", [1e30, -1e30, 1e18, -50.0])
def test_what_is_far_is_told_and_moves_nothing_much(name: str, bad: float) -> None:
    x = 1 + 0.1 * drawn(8, 5)
    x[2] = bad
    found, influence = combined(RULES[name], replies(x))
    assert np.abs(found - 1).max() < 0.6
    assert influence[2] < 0.15
    assert influence[2] == min(influence)


@pytest.mark.parametrize("name", ROBUST)
def test_below_its_least_number_of_replies_a_rule_combines_nothing(name: str) -> None:
    rule = RULES[name]
    combined(rule, replies(drawn(rule.least)))
    few = replies(drawn(rule.least))[1:]
    with pytest.raises(TooFew, match=f"{rule.rule} needs at least {rule.least} replies, got"):
        rule.combine({"w": torch.zeros(6)}, few)
    absent = [*few, Reply("late", few[0].upload if few else {}, 0.0)]
    with pytest.raises(NoReplies):
        rule.combine({"w": torch.zeros(6)}, absent)


def test_the_least_numbers_are_those_of_the_papers() -> None:
    numbers = {
        Median(): 3,
        TrimmedMean(0.2): 5,
        TrimmedMean(0.1): 10,
        TrimmedMean(0.29): 4,
        Krum(1): 5,
        Krum(2): 7,
        MultiKrum(2): 7,
        MultiKrum(2, 9): 11,
        Bulyan(1): 7,
        Bulyan(2): 11,
        GeometricMedian(): 3,
        CentredClip(1.0): 1,
        NormBound(1.0): 1,
        CentredClip(): 3,
        NormBound(): 3,
    }
    assert {rule: rule.least for rule in numbers} == numbers


def test_a_share_of_clients_is_counted_as_written() -> None:
    x = np.arange(100.0)[:, None]
    x[:29] = -1e9
    found, _ = combined(TrimmedMean(0.29), replies(x))
    assert found == pytest.approx(np.arange(29.0, 71.0).mean()), "0.29 * 100 is 28.99... in floats"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda: Krum(0), "combine.krum.attackers must be at least 1, got 0"),
        (lambda: MultiKrum(-1), "combine.multi_krum.attackers must be at least 1"),
        (lambda: MultiKrum(1, 0), "combine.multi_krum.chosen must be at least 1"),
        (lambda: Bulyan(0), "combine.bulyan.attackers must be at least 1"),
        (lambda: TrimmedMean(0.5), r"trimmed_mean.share must be in \(0, 0.5\), got 0.5"),
        (lambda: TrimmedMean(0), "trimmed_mean.share must be in"),
        (lambda: CentredClip(0), "centred_clip.radius must be a positive number, got 0"),
        (lambda: CentredClip(math.nan), "centred_clip.radius must be a positive number"),
        (lambda: CentredClip(1.0, 0), "centred_clip.iterations must be at least 1, got 0"),
        (lambda: NormBound(math.inf), "norm_bound.bound must be a positive number, got inf"),
    ],
)
def test_a_rule_checks_itself(rule: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rule()


def test_the_table_has_every_rule_under_the_name_it_gives_itself() -> None:
    for name, kind in COMBINES.items():
        (rule,) = {one.rule for one in RULES.values() if type(one) is kind}
        assert rule == name


def test_the_mean_is_the_mean_to_the_bit() -> None:
    given = replies(drawn(5), [1, 2, 3, 4, 5])
    found, told = Mean().combine({}, iter(given))
    assert torch.equal(found["w"], mean_upload(iter(given))["delta"]["w"])
    assert not told


def test_of_the_groups_of_an_upload_only_the_delta_is_compared() -> None:
    given = replies(HAND)
    odd = {**given[0].upload, "probe": {"row": torch.ones(3)}}
    delta, _ = Krum(1).combine({"w": torch.zeros(2)}, [Reply("c00", odd), *given[1:]])
    assert delta["w"].tolist() == [1.0, 1.0]


def test_large_weights_do_not_count_where_clients_are_chosen_or_sorted() -> None:
    x = 1 + 0.1 * drawn(8, 5)
    x[2] = -50
    weights = [1.0, 1.0, 1e6, *[1.0] * 5]
    for name in ("median", "trimmed_mean", "krum", "multi_krum", "bulyan"):
        plain: Mapping[str, Any] = {"found": combined(RULES[name], replies(x))[0]}
        assert combined(RULES[name], replies(x, weights))[0].tolist() == plain["found"].tolist()
