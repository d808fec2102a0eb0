import pytest
import torch

from fedloom.core.masks import fill, kept_shares, num_kept, pick
from fedloom.core.sparsity import restrict

PARAMS = {"a": torch.arange(1.0, 7.0).view(2, 3), "b": torch.tensor([7.0, -8.0])}
MASK = {"a": PARAMS["a"] % 2 == 0, "b": torch.tensor([False, True])}
NONE = {name: torch.zeros_like(t, dtype=torch.bool) for name, t in PARAMS.items()}


def test_what_is_picked_is_filled_in_again() -> None:
    picked = pick(PARAMS, MASK)
    assert {name: t.tolist() for name, t in picked.items()} == {"a": [2.0, 4.0, 6.0], "b": [-8.0]}
    whole, expected = fill(picked, MASK), restrict(PARAMS, MASK)
    assert all(torch.equal(whole[name], t) for name, t in expected.items())
    assert whole["a"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_stay_and_nothing_may_be_kept(dtype: torch.dtype) -> None:
    params = {name: t.to(dtype) for name, t in PARAMS.items()}
    picked = pick(params, NONE)
    assert {t.numel() for t in picked.values()} == {0}
    assert all(t.dtype == dtype and not bool(t.any()) for t in fill(picked, NONE).values())


def test_shares_are_counted_over_all_and_by_tensor_one_mask_a_client() -> None:
    assert num_kept(MASK) == 4
    assert kept_shares([MASK]) == {"download_density": 0.5, "density/a": 0.5, "density/b": 0.5}
    both = kept_shares([MASK, NONE, MASK, MASK])
    assert both == {"download_density": 0.375, "density/a": 0.375, "density/b": 0.375}
    assert kept_shares([]) == {}
