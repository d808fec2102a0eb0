"""Rules that bound how far an update pulls, by a number of the recipe's or by one that the round's updates give."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tests.server.test_combine import RULES, combined, drawn, replies

from fedloom.algorithms.fedavg import FedAvg
from fedloom.recipe import build_recipe
from fedloom.server.combine.bounded import CentredClip, NormBound


def lower_median(values: Sequence[Any]) -> Any:
    return sorted(values)[(len(values) - 1) // 2]


def plain_centred_clip(
    x: np.ndarray[Any, Any], weights: Sequence[float], radius: float | None = 2.0
) -> np.ndarray[Any, Any]:
    v = np.zeros(x.shape[1])
    for _ in range(3):
        far = [np.linalg.norm(row - v) for row in x]
        most = lower_median(far) if radius is None else radius
        pull = [
            w * (row - v) * min(1.0, most / length)
            for row, w, length in zip(x, weights, far, strict=True)
        ]
        v = v + sum(pull) / sum(weights)
    return v


def plain_norm_bound(
    x: np.ndarray[Any, Any], weights: Sequence[float], bound: float | None = 1.5
) -> np.ndarray[Any, Any]:
    most = lower_median([np.linalg.norm(row) for row in x]) if bound is None else bound
    bounded = [row * min(1.0, most / np.linalg.norm(row)) for row in x]
    found: np.ndarray[Any, Any] = np.average(bounded, axis=0, weights=weights)
    return found


PLAIN: dict[str, Callable[[Any, Any], Any]] = {
    "centred_clip": plain_centred_clip,
    "norm_bound": plain_norm_bound,
    "centred_clip by the median": lambda x, weights: plain_centred_clip(x, weights, None),
    "norm_bound by the median": lambda x, weights: plain_norm_bound(x, weights, None),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [7, 8, 11])
@pytest.mark.parametrize("name", PLAIN)
def test_a_bounded_rule_is_what_it_is_when_written_down_plainly(
    name: str, count: int, seed: int
) -> None:
    x = drawn(count, seed=seed) * (1 + 4 * (np.arange(count) % 5 == 0))[:, None]
    weights = [1.0 + at % 3 for at in range(count)]
    found, _ = combined(RULES[name], replies(x, weights))
    assert found == pytest.approx(PLAIN[name](x, weights), abs=1e-9)


def test_the_median_of_norms_by_hand() -> None:
    found, kept = combined(NormBound(), replies([[1.0], [2.0], [-4.0], [8.0]]))
    assert found == pytest.approx([(1 + 2 - 2 + 2) / 4]), (
        "norms 1 2 4 8, of the middle two the lower"
    )
    assert kept == pytest.approx([1, 1, 0.5, 0.25])


def test_the_median_of_distances_by_hand() -> None:
    once, _ = combined(CentredClip(iterations=1), replies([[1.0], [3.0], [-9.0]]))
    assert once == pytest.approx([(1 + 3 - 3) / 3])
    twice, _ = combined(CentredClip(iterations=2), replies([[1.0], [3.0], [-9.0]]))
    assert twice == pytest.approx([1 / 3 + (2 / 3 + 8 / 3 - 8 / 3) / 3])


@pytest.mark.parametrize("rule", [CentredClip(), NormBound()])
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e6])
def test_a_bound_of_the_rounds_own_goes_with_the_size_of_its_updates(
    rule: CentredClip | NormBound, scale: float
) -> None:
    x = drawn(8)
    plain, kept = combined(rule, replies(x))
    scaled, again = combined(rule, replies(scale * x))
    assert scaled / scale == pytest.approx(plain)
    assert again == pytest.approx(kept)


@pytest.mark.parametrize("rule", [CentredClip(), NormBound()])
def test_where_most_change_nothing_nobody_changes_anything(rule: CentredClip | NormBound) -> None:
    x = np.zeros((8, 3))
    x[0], x[5] = 7, -1e30
    found, kept = combined(rule, replies(x))
    assert np.abs(found).max() < 1e-60
    assert kept == pytest.approx([0, 1, 1, 1, 1, 0, 1, 1])


@pytest.mark.parametrize("name", ["centred_clip", "norm_bound"])
def test_a_recipe_may_leave_the_bound_to_the_round(name: str) -> None:
    data = {"num_clients": 3}
    sections = {"name": "x", "data": data, "tune": {"lora": {"origin": "zero"}}}
    recipe = build_recipe(sections | {"algorithm": {"fedavg": {"combine": name}}})
    assert isinstance(recipe.algorithm, FedAvg)
    assert recipe.algorithm.combine.least == 3
    with pytest.raises(ValueError, match=f"{name} needs at least 3 replies"):
        build_recipe(
            sections | {"data": {"num_clients": 2}, "algorithm": {"fedavg": {"combine": name}}}
        )
