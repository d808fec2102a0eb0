"""What an upload must be before anybody sums it."""

import pytest
import torch
from torch import Tensor

from fedloom.core.protocols import ClientError
from fedloom.core.schema import check_finite

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_finite_entries_are_finite_though_their_sum_is_not(dtype: torch.dtype) -> None:
    largest = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(largest.sum())
    check_finite({"delta": {"w": largest, "v": -largest, "none": largest[:0]}})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "odd",
    [
        torch.tensor([1.0, torch.nan]),
        torch.tensor([torch.inf]),
        torch.tensor(-torch.inf),
        torch.tensor([[torch.inf, -torch.inf]]),
        torch.tensor([0.0, -torch.nan, 3e38]),
    ],
)
def test_an_entry_that_is_not_finite_is_refused_by_name(odd: Tensor, dtype: torch.dtype) -> None:
    with pytest.raises(ClientError, match="upload control/w is not finite"):
        check_finite({"delta": {"w": torch.ones(3)}, "control": {"w": odd.to(dtype)}})


def test_whole_numbers_and_masks_are_finite() -> None:
    whole = torch.tensor([2**63 - 1, -(2**63)])
    check_finite({"delta": {"n": whole, "m": torch.ones(3, dtype=torch.bool)}, "empty": {}})
