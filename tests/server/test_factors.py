"""Sums of low-rank factors against dense matrices, and against what published code makes of the same factors."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedloom.server.factors.pair import EMPTY, Pair, difference, norm, singular, total
from fedloom.server.factors.rules import (
    AGGREGATES,
    SVD,
    Aggregate,
    Client,
    Combined,
    Fair,
    Mean,
    Pad,
    Residual,
    Stack,
    target,
)
from fedloom.spaces.lora import scale

RULES = [Mean(), Pad(), Pad("examples"), SVD(), SVD("b"), Stack(), Residual(), Fair()]
IDS = ["mean", "pad", "pad examples", "svd", "svd b", "stack", "residual", "fair"]


@dataclass(frozen=True)
class Upload:
    """One client's factors of a layer, as it trained them."""

    weight: float
    alpha: float
    rslora: bool
    b: Tensor
    a: Tensor

    @property
    def scale(self) -> float:
        return scale(self.alpha, len(self.a), rslora=self.rslora)


def drawn(
    seed: int,
    ranks: Sequence[int],
    weights: Sequence[float],
    *,
    alphas: Sequence[float] = (16.0,),
    rslora: Sequence[bool] = (False,),
    height: int = 12,
    width: int = 20,
    dtype: torch.dtype = torch.float64,
) -> list[Upload]:
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)

    return [
        Upload(
            weight,
            alphas[i % len(alphas)],
            rslora[i % len(rslora)],
            normal(height, rank),
            normal(rank, width),
        )
        for i, (rank, weight) in enumerate(zip(ranks, weights, strict=True))
    ]


def clients(uploads: Sequence[Upload]) -> list[Client]:
    whole = sum(upload.weight for upload in uploads)
    return [Client(u.weight / whole, Pair.of(u.b, u.a).times(u.scale)) for u in uploads]


def dense(uploads: Sequence[Upload]) -> Tensor:
    """Return M, a matrix at a time."""
    whole = sum(u.weight for u in uploads)
    found = torch.zeros(len(uploads[0].b), uploads[0].a.shape[1], dtype=torch.float64)
    for u in uploads:
        found += u.weight / whole * u.scale * (u.b.double() @ u.a.double())
    return found


def before(uploads: Sequence[Upload]) -> Pair:
    rank = max(len(u.a) for u in uploads)
    source = torch.Generator().manual_seed(99)
    a = torch.randn(rank, uploads[0].a.shape[1], generator=source, dtype=torch.float64)
    return Pair(torch.zeros(len(uploads[0].b), rank, dtype=torch.float64), a)


def product(pair: Pair | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if pair is None else pair.b @ pair.a


def written(combined: Combined, like: Tensor) -> Tensor:
    return product(combined.learns, like) + product(combined.frozen, like)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


CASES = st.tuples(
    st.integers(0, 2**31),
    st.lists(
        st.tuples(
            st.integers(1, 9),
            st.floats(0.01, 100.0),
            st.sampled_from([1.0, 8.0, 16.0, 33.0]),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 14),
    st.integers(1, 14),
)


def rounded(pair: Pair) -> float:
    """Return what the rounding of factors is in proportion to."""
    return float(pair.b.norm() * pair.a.norm())


def check_exact(case: tuple[int, list[tuple[int, float, float, bool]], int, int]) -> None:
    seed, each, height, width = case
    ranks, weights, alphas, rslora = zip(*each, strict=True)
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        uploads = drawn(
            seed,
            ranks,
            weights,
            alphas=alphas,
            rslora=rslora,
            height=height,
            width=width,
            dtype=dtype,
        )
        # Products may cancel, inside a client's and between them, and what their factors are rounded to does not.
        wanted, size = dense(uploads), sum(rounded(client.part) for client in clients(uploads))
        for rule in (Stack(), Residual()):
            combined = rule.combine(clients(uploads), before(uploads))
            parts = [p for p in (combined.learns, combined.frozen) if p is not None]
            sent = [Pair.of(p.b.to(dtype), p.a.to(dtype)) for p in parts]
            gap = float((product(total(sent), wanted) - wanted).norm())
            assert gap <= most * (size + sum(map(rounded, parts)))
        held = singular(target(clients(uploads)))
        near = product(held.balanced(held.rank), wanted)
        assert float((near - wanted).norm()) <= 1e-12 * max(size, 1e-300) * 10


@given(CASES)
@settings(max_examples=200, deadline=None)
def test_stack_and_residual_are_the_sum_whatever_ranks_scales_weights_and_shapes(case):
    check_exact(case)


@pytest.mark.slow
@given(CASES)
@settings(max_examples=10_000, deadline=None)
def test_stack_and_residual_are_the_sum_in_ten_thousand_cases(case):
    check_exact(case)


MIXED = drawn(1, (2, 4, 8), (1.0, 2.0, 3.0), alphas=(16, 8), rslora=(False, True))
ALIKE = drawn(2, (4, 4, 4), (1.0, 2.0, 3.0))


def missing_scale(uploads: Sequence[Upload]) -> list[Client]:
    whole = sum(u.weight for u in uploads)
    return [Client(u.weight / whole, Pair.of(u.b, u.a)) for u in uploads]


def scaled_twice(uploads: Sequence[Upload]) -> list[Client]:
    return [
        Client(c.share, c.pair.times(u.scale))
        for c, u in zip(clients(uploads), uploads, strict=True)
    ]


def unweighted(uploads: Sequence[Upload]) -> list[Client]:
    return [Client(1 / len(uploads), c.pair) for c in clients(uploads)]


def share_on_both(uploads: Sequence[Upload]) -> list[Client]:
    return [Client(c.share**2, c.pair) for c in clients(uploads)]


@pytest.mark.parametrize("rule", [Stack(), Residual()], ids=["stack", "residual"])
@pytest.mark.parametrize("mistake", [missing_scale, scaled_twice, unweighted, share_on_both])
def test_a_missing_scale_or_weight_is_no_sum(
    rule: Aggregate, mistake: Callable[[Sequence[Upload]], list[Client]]
):
    wanted = dense(MIXED)
    assert off(written(rule.combine(clients(MIXED), before(MIXED)), wanted), wanted) < 1e-12
    assert off(written(rule.combine(mistake(MIXED), before(MIXED)), wanted), wanted) > 1e-2


def test_a_transposed_residual_is_no_sum_of_a_square_layer():
    square = drawn(3, (4, 4, 4), (1.0, 2.0, 3.0), height=16, width=16)
    combined, wanted = Residual().combine(clients(square), before(square)), dense(square)
    assert combined.learns is not None
    assert combined.frozen is not None
    turned = product(combined.learns, wanted) + product(combined.frozen, wanted).T
    assert off(turned, wanted) > 0.5
    assert off(written(combined, wanted), wanted) < 1e-12


@pytest.mark.parametrize("rule", RULES, ids=IDS)
@pytest.mark.parametrize("uploads", [MIXED, ALIKE], ids=["mixed", "alike"])
def test_the_error_that_a_rule_names_is_that_of_dense_matrices(rule: Aggregate, uploads):
    if uploads is MIXED and not rule.mixes:
        return
    combined, wanted = rule.combine(clients(uploads), before(uploads)), dense(uploads)
    gap = float((written(combined, wanted) - wanted).norm())
    assert abs(gap - combined.error) < 1e-10 * float(wanted.norm())


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_clients_that_agree_are_believed_five_times_over(rule: Aggregate):
    one = drawn(4, (4,), (1.0,))[0]
    pair = Pair.of(one.b, one.a).times(one.scale)
    wanted = pair.b @ pair.a
    frozen = torch.zeros_like(wanted)
    start = before([one])
    for _ in range(5):
        combined = rule.combine([Client(0.2, pair), Client(0.5, pair), Client(0.3, pair)], start)
        frozen = frozen + product(combined.frozen, wanted)
        if combined.learns is None:
            # What is frozen is not learnt again.
            pair = Pair(torch.zeros_like(pair.b), pair.a)
        else:
            pair = combined.learns
        assert off(frozen + pair.b @ pair.a, wanted) < (1e-3 if rule == Fair() else 1e-10)


def test_what_svd_lacks_is_the_tail_of_a_dense_svd_and_falls_with_the_rank():
    wanted = dense(MIXED)
    values = torch.linalg.svdvals(wanted)
    errors = []
    for rank in range(1, 13):
        start = Pair(
            torch.zeros(12, rank, dtype=torch.float64), torch.ones(rank, 20, dtype=torch.float64)
        )
        combined = SVD().combine(clients(MIXED), start)
        assert combined.error == pytest.approx(float(values[rank:].norm()), abs=1e-10)
        assert combined.learns is not None
        assert combined.learns.rank == rank
        errors.append(combined.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10 < errors[-2]


def test_no_other_rule_of_the_same_rank_comes_nearer_than_svd():
    best = SVD().combine(clients(ALIKE), before(ALIKE)).error
    for rule in (Mean(), Pad(), Fair(0.001)):
        assert rule.combine(clients(ALIKE), before(ALIKE)).error >= best
    assert (
        Fair(0.001).combine(clients(ALIKE), before(ALIKE)).error
        < Mean().combine(clients(ALIKE), before(ALIKE)).error
    )


def test_a_direction_that_nobody_used_keeps_its_row_of_a_and_can_learn():
    few = drawn(5, (2,), (1.0,))
    start = Pair(torch.zeros(12, 6, dtype=torch.float64), torch.ones(6, 20, dtype=torch.float64))
    learns = SVD().combine(clients(few), start).learns
    assert learns is not None
    assert torch.equal(learns.a[2:], start.a[2:])
    assert not bool(learns.b[:, 2:].any())
    assert off(learns.b @ learns.a, dense(few)) < 1e-12


def test_singular_vectors_have_one_sign_and_the_split_is_even():
    learns = SVD().combine(clients(ALIKE), before(ALIKE)).learns
    assert learns is not None
    at = learns.b.abs().argmax(0)
    assert bool((learns.b[at, torch.arange(4)] > 0).all())
    assert torch.allclose(learns.b.norm(dim=0), learns.a.norm(dim=1))
    turned = [Client(c.share, Pair(-c.pair.b, -c.pair.a)) for c in clients(ALIKE)]
    again = SVD().combine(turned, before(ALIKE)).learns
    assert again is not None
    assert torch.allclose(again.b, learns.b)
    assert torch.allclose(again.a, learns.a)


def test_rows_of_a_have_length_one_where_b_holds_the_scale():
    learns = SVD("b").combine(clients(ALIKE), before(ALIKE)).learns
    assert learns is not None
    assert torch.allclose(learns.a @ learns.a.T, torch.eye(4, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("height", "width", "rank"), [(4, 4, 4), (4, 9, 4), (9, 4, 4), (3, 3, 5)])
def test_layers_as_narrow_as_the_rank_are_summed_as_others(height: int, width: int, rank: int):
    uploads = drawn(6, (rank, rank), (1.0, 3.0), height=height, width=width)
    wanted = dense(uploads)
    for rule in (Stack(), Residual(), SVD()):
        combined = rule.combine(clients(uploads), before(uploads))
        assert off(written(combined, wanted), wanted) < 1e-12


def test_clients_that_learnt_nothing_weigh_nothing_by_norm():
    still = Client(0.5, Pair.of(torch.zeros(12, 4), torch.randn(4, 20)))
    moved = Client(0.5, Pair.of(torch.ones(12, 4), torch.ones(4, 20)))
    learns = Pad().combine([still, moved], before(ALIKE)).learns
    assert learns is not None
    assert torch.equal(learns.b, moved.pair.b)
    assert torch.equal(learns.a, moved.pair.a)
    nothing = Pad().combine([still, still], before(ALIKE))
    assert nothing.error == 0.0


def test_the_ridge_pulls_b_to_its_mean():
    mean, held = (rule.combine(clients(ALIKE), before(ALIKE)) for rule in (Mean(), Fair(1e9)))
    assert mean.learns is not None
    assert held.learns is not None
    assert torch.allclose(held.learns.b, mean.learns.b, atol=1e-5)
    assert torch.equal(held.learns.a, mean.learns.a)


def test_the_correction_of_fair_is_where_its_derivative_is_zero():
    ridge = 0.3
    learns = Fair(ridge).combine(clients(ALIKE), before(ALIKE)).learns
    mean = Mean().combine(clients(ALIKE), before(ALIKE)).learns
    assert learns is not None
    assert mean is not None
    b = learns.b.clone().requires_grad_()
    loss = (dense(ALIKE) - b @ learns.a).square().sum() + ridge * (b - mean.b).square().sum()
    (slope,) = torch.autograd.grad(loss, b)
    assert float(slope.norm()) < 1e-9 * float(dense(ALIKE).norm())


def test_rounding_is_told_from_rank():
    found = singular(
        total([Pair.of(torch.ones(5, 1), torch.ones(1, 7)).times(w) for w in (0.1, 0.2, 0.7)])
    )
    assert found.rank == 1
    assert float(found.values[1]) < EMPTY * float(found.values[0])
    assert singular(Pair(torch.zeros(5, 2).double(), torch.zeros(2, 7).double())).rank == 0


def test_a_difference_of_equals_is_nothing():
    pair = clients(ALIKE)[0].pair
    assert norm(difference(pair, pair)) < 1e-12 * norm(pair)


# --- what published code makes of the same factors -----------------------------------------------


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return benchmarks/factors.py as a module: it holds published arithmetic."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    # It asks for one thread, of its own process.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return importlib.import_module("factors")


def test_ours_are_nearer_to_the_sum_than_what_published_code_makes_of_it(benchmark):
    for heterogeneity in (0.1, 0.5, 1.0):
        found = benchmark.errors(heterogeneity, size=64)
        assert found["stack"] < 1e-12
        assert found["residual"] < 1e-12
        assert found["svd"] <= min(found["mean"], found["fair"]) <= found["FedIT"] + 1e-12
        assert found["mean"] == pytest.approx(found["FedIT"], rel=1e-9)
        for published in found:
            if published not in (*AGGREGATES, "FedIT", "FLoRA's code"):
                assert found[published] > 0.01, published
        # Everybody takes part, of one rank and one scale.
        assert found["FLoRA's code"] < 1e-12


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Fair(0.0), "fair.ridge must be a positive number, got 0.0"),
        (lambda: Fair(float("inf")), "fair.ridge must be a positive number, got inf"),
        (lambda: Pad(cast("Any", "length")), "pad.weights must be norm or examples, got 'length'"),
        (lambda: SVD(cast("Any", "a")), "svd.split must be balanced or b, got 'a'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(make: Callable[[], Aggregate], said: str):
    with pytest.raises(ValueError, match=said):
        make()
