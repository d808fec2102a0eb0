"""LoRA's factors under rules that combine: what counts is their product."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom.core.payloads import mean_upload
from fedloom.core.protocols import Params, Reply
from fedloom.server.combine import Combine, Mean
from fedloom.server.combine.bounded import CentredClip, GeometricMedian, NormBound
from fedloom.server.combine.chosen import Bulyan, Krum, MultiKrum
from fedloom.server.combine.products import inner_products, pairs, settled, squared_distances
from fedloom.server.combine.sorted import Median, TrimmedMean
from fedloom.server.combine.weights import best, krum_scores

LAYERS = ("layers.0.q_proj", "layers.1.v_proj")
RANK, WIDTH, HEIGHT = 4, 40, 24
ROBUST: list[Combine] = [
    Median(),
    TrimmedMean(0.25),
    Krum(2),
    MultiKrum(2),
    Bulyan(1),
    GeometricMedian(),
    CentredClip(2.0),
    NormBound(2.0),
]
IDS = [rule.rule for rule in ROBUST]


def names(layer: str) -> tuple[str, str]:
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def world(count: int = 8, *, trained: bool = True) -> tuple[dict[str, Tensor], list[Params]]:
    """Return a start and honest updates: what is common to all, and a part of each one's own."""
    source = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    start, common = {}, {}
    for layer in LAYERS:
        a, b = names(layer)
        start[a] = 0.2 * normal(RANK, WIDTH)
        start[b] = 0.2 * normal(HEIGHT, RANK) if trained else torch.zeros(HEIGHT, RANK)
        common[a], common[b] = 0.05 * normal(RANK, WIDTH), 0.2 * normal(HEIGHT, RANK)
    start["norm.weight"], common["norm.weight"] = normal(7), 0.1 * normal(7)
    deltas: list[Params] = [
        {n: t + 0.2 * t.std() * normal(*t.shape) for n, t in common.items()} for _ in range(count)
    ]
    return start, deltas


def effect(start: Params, delta: Params) -> Tensor:
    """Return the change of the model, written down in full."""
    parts = [delta["norm.weight"].double()]
    for a, b in (names(layer) for layer in LAYERS):
        a0, b0 = start[a].double(), start[b].double()
        parts.append(((b0 + delta[b]) @ (a0 + delta[a]) - b0 @ a0).flatten())
    return torch.cat(parts)


def turned(start: Params, delta: Params, seed: int, *, scale: float = 0.0) -> Params:
    """Return the same change of the model by other factors: (B Q, Q^-1 A), with Q random, or B / scale and scale A."""
    source, out = torch.Generator().manual_seed(seed), dict(delta)
    for a, b in (names(layer) for layer in LAYERS):
        q = torch.randn(RANK, RANK, generator=source, dtype=torch.float64)
        q = torch.eye(RANK, dtype=torch.float64) / scale if scale else q
        whole_a, whole_b = start[a].double() + delta[a], start[b].double() + delta[b]
        out[a] = (torch.linalg.solve(q, whole_a) - start[a]).float()
        out[b] = (whole_b @ q - start[b]).float()
    return out


def replies(deltas: Sequence[Params]) -> list[Reply]:
    return [Reply(f"c{at}", {"delta": delta}) for at, delta in enumerate(deltas)]


def combined(rule: Combine, start: Params, deltas: Sequence[Params]) -> tuple[Params, list[float]]:
    delta, told = rule.combine(start, replies(deltas))
    return delta, list(told.values())


def apart(start: Params, a: Params, b: Params) -> float:
    """Return how far two updates are apart in the model, in units of the second."""
    return float((effect(start, a) - effect(start, b)).norm() / effect(start, b).norm())


@pytest.mark.parametrize("trained", [False, True], ids=["first round", "later"])
def test_inner_products_are_those_of_the_products_written_down(trained: bool) -> None:
    start, deltas = world(trained=trained)
    rows = torch.stack([effect(start, delta) for delta in deltas])
    assert torch.allclose(inner_products(start, deltas), rows @ rows.T, rtol=1e-6, atol=1e-9)
    assert [a for a, _ in pairs(start)] == [names(layer)[0] for layer in LAYERS]


def test_a_b_whose_a_is_frozen_counts_as_it_is() -> None:
    start, deltas = world()
    some = [{n: t for n, t in delta.items() if "lora_A" not in n} for delta in deltas]
    kept = {n: t for n, t in start.items() if "lora_A" not in n}
    rows = torch.stack([torch.cat([t.double().flatten() for t in d.values()]) for d in some])
    assert torch.allclose(inner_products(kept, some), rows @ rows.T)


@pytest.mark.parametrize("seed", range(5))
def test_a_factor_turned_at_random_at_every_client_changes_nobodys_place(seed: int) -> None:
    start, deltas = world()
    away = [turned(start, delta, 10 * seed + at) for at, delta in enumerate(deltas)]
    for rule in (Krum(2), MultiKrum(2), MultiKrum(1, 3)):
        assert combined(rule, start, away)[1] == combined(rule, start, deltas)[1]
    plain = torch.stack([torch.cat([t.double().flatten() for t in d.values()]) for d in away])
    straight = torch.stack([torch.cat([t.double().flatten() for t in d.values()]) for d in deltas])
    per_factor = [best(krum_scores(squared_distances(x @ x.T), 2), 8) for x in (plain, straight)]
    assert per_factor[0] != per_factor[1], "distances of factors are taken in"


@pytest.mark.parametrize("rule", ROBUST, ids=IDS)
def test_what_comes_of_turned_factors_is_nearly_what_comes_of_straight_ones(rule: Combine) -> None:
    start, deltas = world()
    away = [turned(start, delta, at) for at, delta in enumerate(deltas)]
    assert apart(start, combined(rule, start, away)[0], combined(rule, start, deltas)[0]) < 0.1
    assert apart(start, combined(Mean(), start, away)[0], combined(Mean(), start, deltas)[0]) > 0.5


@pytest.mark.parametrize("rule", ROBUST, ids=IDS)
@pytest.mark.parametrize("scale", [1e3, 1e-3, 1e2, -1.0])
@pytest.mark.parametrize("trained", [False, True], ids=["first round", "later"])
def test_a_huge_a_beside_a_tiny_b_does_not_pass(rule: Combine, scale: float, trained: bool) -> None:
    start, deltas = world(trained=trained)
    bad = [turned(start, delta, 0, scale=scale) for delta in deltas[:2]] + deltas[2:]
    found, _ = combined(rule, start, bad)
    assert apart(start, found, combined(rule, start, deltas)[0]) < 0.1
    assert max(float(t.abs().max()) for t in found.values()) < 2
    if scale == 1e3:
        assert apart(start, combined(Mean(), start, bad)[0], combined(Mean(), start, deltas)[0]) > 5


@pytest.mark.parametrize("rule", ROBUST, ids=IDS)
@pytest.mark.parametrize("trained", [False, True], ids=["first round", "later"])
@pytest.mark.parametrize("size", [1.0, 1e6, 1e30])
def test_factors_without_a_product_move_a_by_nothing_much(
    rule: Combine, trained: bool, size: float
) -> None:
    start, deltas = world(trained=trained)
    source = torch.Generator().manual_seed(9)
    hidden = []
    for delta in deltas[:2]:
        bad = dict(delta)
        for a, b in (names(layer) for layer in LAYERS):
            bad[a] = size * torch.randn(start[a].shape, generator=source)
            bad[b] = -start[b]
        hidden.append(bad)
    found, _ = combined(rule, start, [*hidden, *deltas[2:]])
    moved = max(
        float(found[names(layer)[0]].norm() / start[names(layer)[0]].norm()) for layer in LAYERS
    )
    assert moved < 1
    straight = combined(rule, start, deltas)[0]
    assert apart(start, found, straight) < 1


def test_honest_factors_are_taken_to_the_bit() -> None:
    for trained in (False, True):
        start, deltas = world(trained=trained)
        assert all(settled(start, delta) is delta for delta in deltas)
        given = replies(deltas)
        mean = mean_upload(given)["delta"]
        bounded, _ = NormBound(1e9).combine(start, given)
        assert all(torch.equal(t, bounded[name]) for name, t in mean.items())


def test_the_nearest_factors_depend_on_the_product_alone() -> None:
    start, deltas = world()
    once = [settled(start, turned(start, deltas[0], seed)) for seed in range(4)]
    for other in once[1:]:
        assert all(torch.allclose(t, other[n], atol=1e-3) for n, t in once[0].items())
    assert apart(start, once[0], deltas[0]) < 0.1
    again = settled(start, once[0])
    assert again is once[0]


@pytest.mark.parametrize("rule", ROBUST, ids=IDS)
def test_coordinates_that_count_from_where_a_began_are_refused(rule: Combine) -> None:
    start, _ = world()
    began = {n: torch.zeros_like(t) for n, t in start.items()}
    with pytest.raises(
        ValueError, match=rf"combine: {rule.rule} .* needs tune.lora.origin zero, or freeze"
    ):
        rule.begin(began)
    rule.begin(start)
    rule.begin({n: t for n, t in began.items() if "lora_A" not in n})
    Mean().begin(began)


@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_a_norm_bound_is_of_the_change_of_the_model(bound: float) -> None:
    start, deltas = world()
    loud: dict[str, Any] = {n: 30 * t for n, t in deltas[0].items()}
    found, told = NormBound(bound).combine(start, [Reply("one", {"delta": loud})])
    assert told["influence/one"] == pytest.approx(bound / float(effect(start, loud).norm()))
    assert float(effect(start, found).norm()) < 1.1 * bound
