from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom.client.local_settings import LocalSettings
from fedloom.client.optimizer import Optimizer

LOCALS = {
    "sgd": LocalSettings(optimizer="sgd", lr=0.1, max_grad_norm=None),
    "decayed sgd": LocalSettings(optimizer="sgd", lr=0.1, weight_decay=0.3, max_grad_norm=None),
    "momentum": LocalSettings(optimizer="sgd", lr=0.1, momentum=0.9, max_grad_norm=None),
    "adamw": LocalSettings(lr=0.01, max_grad_norm=None),
    "decayed adamw": LocalSettings(
        lr=0.01, weight_decay=0.3, betas=(0.8, 0.95), max_grad_norm=None
    ),
    "clipped": LocalSettings(lr=0.01, max_grad_norm=0.7),
}


def theirs(local: LocalSettings, p: torch.Tensor) -> torch.optim.Optimizer:
    if local.optimizer == "sgd":
        return torch.optim.SGD(
            [p], local.lr, momentum=local.momentum, weight_decay=local.weight_decay
        )
    return torch.optim.AdamW([p], local.lr, local.betas, weight_decay=local.weight_decay)


@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS)
def test_a_lane_moves_as_torch_optim_would_move_it(local: LocalSettings):
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(3, 50, generator=draw, dtype=torch.float64)
    gradients = torch.randn(20, 3, 50, generator=draw, dtype=torch.float64)
    values = start.clone()
    ours = Optimizer(local, local.lr, values, None)
    for g in gradients:
        assert ours.step_(values, g.clone(), torch.zeros(3)) == [True] * 3
    for lane in range(3):
        p = start[lane].clone().requires_grad_()
        optimizer = theirs(local, p)
        for g in gradients:
            p.grad = g[lane].clone()
            if local.max_grad_norm:
                torch.nn.utils.clip_grad_norm_([p], local.max_grad_norm)
            optimizer.step()
        assert float((p.detach() - values[lane]).abs().max()) < 1e-12


@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_lane_that_is_not_finite_skips_the_step_and_disturbs_nobody(
    local: LocalSettings, bad: float
):
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(3, 50, generator=draw)
    gradients = torch.randn(6, 3, 50, generator=draw)
    values, alone = start.clone(), start.clone()
    together, without = Optimizer(local, 0.1, values, None), Optimizer(local, 0.1, alone, None)
    for at, g in enumerate(gradients):
        spoiled, losses = g.clone(), torch.zeros(3)
        if at == 2:
            spoiled[1, 7] = bad
        if at == 4:
            losses[1] = bad
        sound = together.step_(values, spoiled, losses)
        assert sound == [True, at not in (2, 4), True]
        if at not in (2, 4):
            without.step_(alone, g.clone(), torch.zeros(3))
        else:
            kept = alone[1].clone()
            assert torch.equal(values[1], kept)
    assert torch.equal(values[1], alone[1])
    whole = start.clone()
    everybody = Optimizer(local, 0.1, whole, None)
    for g in gradients:
        everybody.step_(whole, g.clone(), torch.zeros(3))
    torch.testing.assert_close(values[[0, 2]], whole[[0, 2]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_masked_entry_does_not_decay(optimizer):
    local = LocalSettings(optimizer=optimizer, lr=0.1, weight_decay=0.5)
    values = torch.ones(1, 4)
    mask = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    Optimizer(local, 0.1, values, mask).step_(values, torch.ones(1, 4) * mask, torch.zeros(1))
    assert values[0, 0] == values[0, 2] == 1
    assert values[0, 1] < 1


def test_moments_follow_the_lanes_that_stay():
    local = LocalSettings(lr=0.1)
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, 3, 10, generator=draw)
    values = torch.zeros(3, 10)
    ours = Optimizer(local, 0.1, values, torch.ones(3, 10))
    for g in gradients[:2]:
        ours.step_(values, g.clone(), torch.zeros(3))
    staying = torch.tensor([2, 0])
    ours.keep(staying)
    fewer = values[staying]
    for g in gradients[2:]:
        ours.step_(fewer, g[staying], torch.zeros(2))
        # The same lanes, had nobody left.
    whole = torch.zeros(3, 10)
    everybody = Optimizer(local, 0.1, whole, None)
    for g in gradients:
        everybody.step_(whole, g.clone(), torch.zeros(3))
    torch.testing.assert_close(fewer, whole[staying], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("kind", "bytes_"), [("bfloat16", 4.0), ("float8", 2 * (1 + 4 / 128))])
def test_moments_in_fewer_bits_lead_where_full_ones_do(kind: Any, bytes_: float):
    """A noisy quadratic over many steps, in which a moment that is rounded to nearest would stand still."""
    draw = torch.Generator().manual_seed(0)
    size = 4096
    want, start = torch.randn(size, generator=draw), torch.zeros(2, size)
    gradients = torch.randn(300, 2, size, generator=draw)
    ends, steps = {}, {}
    for name in ("float32", kind):
        local = LocalSettings(lr=0.02, max_grad_norm=None, moments=name)
        values = start.clone()
        optimizer = Optimizer(local, local.lr, values, None)
        for noise in gradients:
            optimizer.step_(values, values - want + 0.3 * noise, torch.zeros(2))
        ends[name] = float((values - want).square().mean())
        steps[name] = optimizer
    assert ends[kind] == pytest.approx(ends["float32"], rel=0.05)
    held = sum(t.nbytes for t in steps[kind]._moments)
    assert held == bytes_ * start.numel()
    # What is held of the squares is what full ones are, on average over entries.
    exact = steps["float32"]._moments[1]
    at = len(steps[kind]._moments) // 2
    found = steps[kind]._held[1].read(steps[kind]._moments[at:], exact, 0)
    assert float(found.mean() / exact.mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["bfloat16", "float8"])
def test_moments_in_fewer_bits_are_the_same_in_windows_and_beside_other_lanes(
    kind: Any, monkeypatch: pytest.MonkeyPatch
):
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(3, 1000, generator=draw)
    gradients = torch.randn(6, 3, 1000, generator=draw) * torch.rand(1000, generator=draw) ** 8
    local = LocalSettings(lr=0.01, moments=kind, weight_decay=0.1)
    values, alone = start.clone(), start[1:2].clone()
    together = Optimizer(local, local.lr, values, None)
    single = Optimizer(local, local.lr, alone, None)
    single._held = [replace(one, window=256) for one in single._held]  # type: ignore[type-var]
    for at, g in enumerate(gradients):
        # A lane that sits one out has counts of its own.
        losses = torch.tensor([float("nan") if at == 2 else 0.0, 0.0, 0.0])
        together.step_(values, g.clone(), losses)
        single.step_(alone, g[1:2].clone(), torch.zeros(1))
    together.keep(torch.tensor([1]))
    assert torch.equal(values[1], alone[0])
    assert all(torch.equal(a, b) for a, b in zip(together._moments, single._moments, strict=True))
    assert values.isfinite().all()


def test_lanes_with_rates_of_their_own_move_as_each_would_alone() -> None:
    local = replace(LOCALS["decayed adamw"], max_grad_norm=0.7)
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(3, 50, generator=draw, dtype=torch.float64)
    gradients = torch.randn(5, 3, 50, generator=draw, dtype=torch.float64)
    factors = [(1.0, 1.0), (0.1, 2.0), (1.0, 0.0)]
    values = start.clone()
    together = Optimizer(local, local.lr, values, None, factors=factors)
    for g in gradients:
        together.step_(values, g.clone(), torch.zeros(3))
    for lane, (lr, decay) in enumerate(factors):
        own = replace(local, weight_decay=local.weight_decay * decay)
        alone = start[lane : lane + 1].clone()
        optimizer = Optimizer(own, local.lr * lr, alone, None)
        for g in gradients:
            optimizer.step_(alone, g[lane : lane + 1].clone(), torch.zeros(1))
        assert torch.equal(alone[0], values[lane])
