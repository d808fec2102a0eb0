"""Which entries are kept."""

import importlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.core.params import flat
from fedloom.core.sparsity import (
    Density,
    Scope,
    densities,
    fill,
    keep_largest,
    largest,
    num_nonzero,
    pick,
    restrict,
    support,
)


def params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return normal tensors whose order is not that of their names."""
    g = torch.Generator().manual_seed(0)
    names = [f"t{at}" for at in reversed(range(len(shapes)))]
    return {n: torch.randn(s, generator=g).to(dtype) for n, s in zip(names, shapes, strict=True)}


@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -1e-30, 1e30, 1e-45]), min_size=1),
    density=st.floats(0, 1, exclude_min=True),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_the_largest_are_those_a_stable_sort_puts_first(
    values: list[float], density: float, dtype: torch.dtype
) -> None:
    """Exactly max(1, floor(n * d)), of equal magnitudes the first."""
    x = torch.tensor(values, dtype=dtype)
    count = max(1, int(len(values) * density))
    order = torch.sort(x.abs().double(), descending=True, stable=True).indices
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[order[:count]] = True
    assert torch.equal(largest({"x": x}, density)["x"], expected)


@pytest.mark.parametrize("density", [1 / 4, 1 / 16, 1 / 64, 0.9, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_entries_are_those_of_topk(density: float, dtype: torch.dtype) -> None:
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = largest({"x": x}, density)["x"]
    count = max(1, int(x.numel() * density))
    assert torch.equal(mask.nonzero().view(-1), x.abs().topk(count).indices.sort().values)


def test_tensors_compete_in_sorted_order_of_their_names() -> None:
    tied = {"b": torch.ones(3), "a": torch.ones(2, 2), "c": torch.tensor([5.0])}
    mask = largest(tied, 0.5)
    assert list(mask) == list(tied)
    assert mask["c"].all()
    assert mask["a"].tolist() == [[True, True], [True, False]]
    assert largest(tied, 7 / 8)["b"].tolist() == [True, True, False]


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_either_scope_keeps_its_share(scope: Scope) -> None:
    given_params = params((40, 5), (7,), (30, 10))
    given_params["t0"] *= 100
    mask = largest(given_params, 1 / 4, scope=scope)
    counts = {name: int(kept.sum()) for name, kept in mask.items()}
    expected = {"t2": 50, "t1": 1, "t0": 75} if scope == "tensor" else counts
    assert counts == expected
    assert sum(counts.values()) == sum(expected.values()) >= 126
    if scope == "global":
        assert sum(counts.values()) == int(507 / 4)
        assert counts["t0"] == 126


def test_the_mask_does_not_depend_on_how_entries_are_cut_into_tensors() -> None:
    x = torch.randn(999, generator=torch.Generator().manual_seed(2))
    whole = largest({"x": x}, 0.1)["x"]
    pieces = {f"x{at}": piece for at, piece in enumerate(x.split(111))}
    assert torch.equal(flat(largest(pieces, 0.1)), whole)


def test_what_is_kept_is_kept_exactly_and_the_rest_is_positive_zero() -> None:
    given_params = params((50, 4), (3, 3), dtype=torch.bfloat16)
    kept = keep_largest(given_params, 1 / 4)
    mask = largest(given_params, 1 / 4)
    for name, tensor in kept.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor[mask[name]], given_params[name][mask[name]])
        rest = tensor[~mask[name]]
        assert not rest.any()
        assert not torch.signbit(rest).any()
    assert all(torch.equal(support(kept)[name], mask[name]) for name in mask)
    assert all(torch.equal(restrict(given_params, mask)[n], kept[n]) for n in mask)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_density_one_is_the_same_object(scope: Scope) -> None:
    given_params = params((5,))
    assert keep_largest(given_params, 1, scope=scope) is given_params


def test_at_least_one_entry_is_kept_and_nothing_of_nothing() -> None:
    assert largest({"x": torch.tensor([1.0, -3.0, 2.0])}, 0.01)["x"].tolist() == [
        False,
        True,
        False,
    ]
    assert keep_largest({}, 0.5) == {}
    assert largest({"x": torch.ones(0, 3)}, 0.5, scope="tensor")["x"].shape == (0, 3)


def test_what_is_no_number_is_not_hidden() -> None:
    x = torch.tensor([1.0, float("nan"), 9.0, float("-inf")])
    assert largest({"x": x}, 0.25)["x"].tolist() == [False, True, False, False]
    assert largest({"x": x}, 0.5)["x"].tolist() == [False, True, False, True]


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5, float("nan")])
def test_a_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\], got"):
        keep_largest(params((5,)), density)


def test_a_mask_of_other_names_is_refused() -> None:
    with pytest.raises(ValueError, match="params differ in"):
        restrict(params((5,)), {"other": torch.ones(5, dtype=torch.bool)})


@pytest.mark.alone
@pytest.mark.slow
def test_the_largest_of_a_million_are_found_three_times_faster_than_by_topk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One thread, CPU seconds, the densities 1/4, 1/16 and 1/64 together, medians of turns."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    timing = importlib.import_module("timing")
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(3))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    densities = (1 / 4, 1 / 16, 1 / 64)
    times = timing.paired(
        {
            "ours": lambda: [largest({"x": x}, d) for d in densities],
            "topk": lambda: [torch.topk(x.abs(), int(x.numel() * d)) for d in densities],
        },
        turns=25,
    )
    torch.set_num_threads(threads)
    assert times["ours"].ratio(times["topk"]) > 3


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
    assert num_nonzero(MASK) == 4
    assert densities([MASK]) == {"download_density": 0.5, "density/a": 0.5, "density/b": 0.5}
    both = densities([MASK, NONE, MASK, MASK])
    assert both == {"download_density": 0.375, "density/a": 0.375, "density/b": 0.375}
    assert densities([]) == {}


def test_a_constant_share_is_the_same_in_every_round() -> None:
    assert {Density(0.1).at(n, {}) for n in (1, 2, 1000)} == {0.1}


def test_a_share_decays_after_every_few_rounds_down_to_the_least() -> None:
    falling = Density(0.8, decay=0.5, every=2, least=0.15)
    assert [falling.at(n, {}) for n in range(1, 9)] == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.15, 0.15]


def test_the_first_rounds_are_dense_and_decay_begins_after_them() -> None:
    warm = Density(0.4, decay=0.5, every=2, warm=2, tiers={"phone": 0.2})
    assert [warm.at(n, {}) for n in range(1, 6)] == [1.0, 1.0, 0.4, 0.4, 0.2]
    assert [warm.at(n, {"tier": "phone"}) for n in (2, 3, 5)] == [1.0, 0.2, 0.1]


def test_a_tier_has_its_own_share_and_others_have_the_start() -> None:
    density = Density(0.5, tiers={"phone": 0.125})
    profiles: tuple[dict[str, str], ...] = (
        {"tier": "phone"},
        {"tier": "desk"},
        {"language": "en"},
        {},
    )
    assert [density.at(1, p) for p in profiles] == [0.125, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": 0.0}, r"start must be in \(0, 1\], got 0"),
        ({"start": 1.5}, r"start must be in \(0, 1\], got 1\.5"),
        ({"start": float("nan")}, r"start must be in \(0, 1\], got nan"),
        ({"decay": 2.0}, r"decay must be in \(0, 1\], got 2"),
        ({"tiers": {"phone": 0.0}}, r"tiers\.phone must be in \(0, 1\], got 0"),
        ({"least": 0.5}, r"least must be in \[0, start\].*got 0\.5"),
        ({"every": 0}, r"every must be at least 1, got 0"),
        ({"warm": -1}, r"warm must be a number of rounds, got -1"),
    ],
)
def test_what_is_no_density_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Density(**fields)  # type: ignore[arg-type]
