"""No client adds more than the clip, whatever it sends."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.params import norm
from fedloom.core.protocols import Payload
from fedloom.privacy.clipping import NoisySum, clipped, moved, within
from fedloom.privacy.noise import secret_key

NUMBERS = st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=20)


def payload(first: list[float], second: list[float], dtype: torch.dtype = torch.float32) -> Payload:
    return {
        "delta": {"w": torch.tensor(first, dtype=dtype)},
        "control_delta": {"w": torch.tensor(second, dtype=dtype)},
    }


@given(first=NUMBERS, second=NUMBERS, clip=st.floats(1e-6, 1e6))
def test_the_joint_norm_of_all_groups_is_at_most_the_clip(
    first: list[float], second: list[float], clip: float
) -> None:
    before = payload(first, second)
    after, size = clipped(before, clip)
    assert size == norm(before)
    assert norm(after) <= clip * (1 + 1e-6)
    if size <= clip:
        assert after is before
    else:
        assert norm(after) == pytest.approx(clip, rel=1e-5)


def test_groups_share_one_factor() -> None:
    after, size = clipped(payload([3.0], [4.0], torch.float64), 1.0)
    assert size == 5
    assert float(after["delta"]["w"]) == pytest.approx(0.6, abs=1e-15)
    assert float(after["control_delta"]["w"]) == pytest.approx(0.8, abs=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [1.0, math.inf])
def test_an_upload_that_is_not_finite_counts_for_nothing(bad: float, clip: float) -> None:
    after, _ = clipped(payload([bad, 1.0], [2.0]), clip)
    assert norm(after) == 0
    assert after["delta"]["w"].shape == (2,)


def test_nothing_is_nothing() -> None:
    assert clipped({}, 1.0) == ({}, 0.0)


def test_what_has_moved_is_where_any_download_is_not_zero() -> None:
    a, b = {"w": torch.tensor([0.0, 1.0, 0.0])}, {"w": torch.tensor([-2.0, 0.0, 0.0])}
    assert moved([a, b, a])["w"].tolist() == [True, True, False]
    assert moved([a])["w"].tolist() == [False, True, False]
    assert moved([{"w": torch.zeros(3)}]) == {} == moved([])


def test_uploads_are_zero_outside_and_other_names_stay_whole() -> None:
    upload = {"delta": {"w": torch.tensor([1.0, -1.0]), "v": torch.tensor([5.0])}}
    inside = within(upload, {"w": torch.tensor([True, False])})
    assert inside["delta"]["w"].tolist() == [1.0, 0.0]
    assert not inside["delta"]["w"][1].signbit(), "-0.0 would travel"
    assert inside["delta"]["v"] is upload["delta"]["v"]


def mean(
    uploads: list[Payload], denominator: float, std: float = 0.0, **mask: torch.Tensor
) -> Payload:
    total = NoisySum()
    for upload in uploads:
        total.add(upload)
    return total.mean(denominator, std=std, key=secret_key(1), path=("noise", 1), mask=mask)


def test_sums_are_float64_and_come_back_as_they_were_but_not_below_float32() -> None:
    small = [payload([1.0], [1e-9])] + [payload([1e-8], [1.0])] * 1000
    assert float(mean(small, 1.0)["delta"]["w"]) == pytest.approx(1.00001, rel=1e-7)
    for dtype, back in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert mean([payload([1.0], [2.0], dtype)], 1.0)["delta"]["w"].dtype is back


def test_noise_has_its_standard_deviation_over_a_million_draws_and_none_outside_the_support() -> (
    None
):
    """Within 1 % of sigma C, in units of the sum."""
    mask = torch.arange(1_000_000) % 4 > 0
    uploads: list[Payload] = [{"delta": {n: torch.zeros(1_000_000) for n in "vw"}}]
    drawn = mean(uploads, 20.0, std=0.35, w=mask)["delta"]
    assert float(drawn["v"].std()) * 20 == pytest.approx(0.35, rel=0.01)
    assert float(drawn["w"][mask].std()) * 20 == pytest.approx(0.35, rel=0.01)
    assert not bool(drawn["w"][~mask].any())
    assert not torch.equal(drawn["v"][mask], drawn["w"][mask]), "each tensor has its own"


def test_what_cannot_be_added_is_refused() -> None:
    with pytest.raises(ValueError, match=r"floating-point numbers only, got torch\.bool in mask/w"):
        mean([{"mask": {"w": torch.tensor([True])}}], 1.0)
    with pytest.raises(ValueError, match=r"one shape, got \(1,\) and \(2,\) in delta/w"):
        mean([payload([1.0], [1.0]), payload([1.0, 2.0], [1.0])], 1.0)


def sealed(uploads: list[Payload], *terms: float, key: int = 1, **mask: torch.Tensor) -> str:
    total = NoisySum()
    for upload in uploads:
        total.add(upload)
    return total.seal(secret_key(key), terms, mask=mask)


def test_a_seal_is_of_numbers_and_of_nothing_else() -> None:
    one = [payload([1.0, 0.0], [2.0])]
    backwards = {"control_delta": one[0]["control_delta"], "delta": one[0]["delta"]}
    assert sealed([backwards], 1) == sealed(one, 1), "in any order"
    assert sealed([payload([1.0, -0.0], [2.0])], 1) == sealed(one, 1), "-0.0 is 0.0"
    halves = [payload([0.5, 0.0], [1.0])] * 2
    assert sealed(halves, 1) == sealed(one, 1), "of the sum"


def test_whatever_differs_has_another_seal() -> None:
    one = payload([1.0, 0.0], [2.0])
    delta, control = one["delta"]["w"], one["control_delta"]["w"]
    mask = torch.tensor([True, False])
    seals = [
        sealed([one], 1.0),
        sealed([one], 2.0),
        sealed([one], 1.0, 1.0),
        sealed([one], 1.0, key=2),
        sealed([one], 1.0, w=mask),
        sealed([one], 1.0, w=~mask),
        sealed([payload([math.nextafter(1.0, 2.0), 0.0], [2.0], torch.float64)], 1.0),
        sealed([payload([1.0, 0.0], [2.0], torch.float64)], 1.0),
        sealed([payload([0.0, 1.0], [2.0])], 1.0),
        sealed([payload([2.0], [1.0, 0.0])], 1.0),
        sealed([{"delta": {"v": delta}, "control_delta": {"w": control}}], 1.0),
        sealed([{"delta": {"w": delta}}], 1.0),
        sealed([{"delta": {"w": delta.view(2, 1)}, "control_delta": {"w": control}}], 1.0),
        sealed([], 1.0),
    ]
    assert len(set(seals)) == len(seals)
