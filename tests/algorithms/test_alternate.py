"""Tensors that take turns."""

from typing import Any

import pytest
import torch

from fedloom.algorithms.alternate import Alternate
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.private import Private
from fedloom.algorithms.scaffold import Scaffold
from fedloom.server.optimizers import Adam

A, B, NORM = "layers.0.lora_A.weight", "layers.0.lora_B.weight", "norm.weight"
INNER = [FedAvg(), FedAvg(mu=0.1), FedAvg(Adam()), Scaffold()]
IDS = ["fedavg", "fedprox", "fedadam", "scaffold"]


def lora() -> dict[str, torch.Tensor]:
    a = torch.arange(8, dtype=torch.float64).view(2, 4)
    return {A: a, B: torch.zeros(4, 2, dtype=torch.float64), NORM: torch.ones(3).double()}


@pytest.mark.parametrize("inner", INNER, ids=IDS)
def test_b_learns_first_and_then_a_and_what_rests_is_not_sent(
    inner: Any, world: Any, parabola: Any
) -> None:
    place = world(Alternate(inner), [parabola(center=1.0), parabola(center=3.0)], lora())
    before = {n: t.clone() for n, t in place.state.params.items()}
    for learns, rests in ((B, A), (A, B)) * 2:
        place.play(1)
        for reply in place.replies:
            assert set(reply.upload["delta"]) == {learns, NORM}
        for fit in place.asked[-2:]:
            assert not bool(fit.mask[rests].any())
            assert bool(fit.mask[learns].all())
            assert bool(fit.mask[NORM].all())
        now = place.state.params
        assert not torch.equal(now[learns], before[learns])
        if not isinstance(inner, FedAvg) or not isinstance(inner.server, Adam):
            assert torch.equal(now[rests], before[rests])
        before = {n: t.clone() for n, t in now.items()}


def test_the_mean_of_products_is_the_product_of_the_mean(world: Any, parabola: Any) -> None:
    losses = [parabola(center=1.0, num_examples=2), parabola(center=3.0), parabola(center=-2.0)]
    place = world(Alternate(FedAvg()), losses, lora())
    for _ in range(4):
        start = place.state.params
        place.play(1)
        weights = [reply.weight for reply in place.replies]
        wanted = torch.zeros(4, 4, dtype=torch.float64)
        for reply in place.replies:
            own = {
                n: t + reply.upload["delta"].get(n, torch.zeros_like(t)) for n, t in start.items()
            }
            wanted += reply.weight / sum(weights) * own[B] @ own[A]
        now = place.state.params
        assert float((now[B] @ now[A] - wanted).norm()) < 1e-12 * float(wanted.norm() + 1)


def test_noise_covers_what_learns_and_moves_nothing_that_rests(world: Any, parabola: Any) -> None:
    private = Private(Alternate(FedAvg()), clip=1.0, noise_multiplier=1.0, noise_seed=1)
    place = world(private, [parabola(center=1.0)] * 3, lora())
    place.play(1)
    assert torch.equal(place.state.inner.params[A], lora()[A])
    assert bool(place.state.inner.params[B].any())


@pytest.mark.parametrize("names", [(), ("lora_A",), ("lora_A", "lora_A"), ("lora_A", "")])
def test_turns_of_fewer_than_two_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"alternate\.names must be two or more different parts"):
        Alternate(FedAvg(), names)


def test_a_name_that_no_tensor_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"such as layers\.0\.lora_A\.weight, got 'lora_C'"):
        Alternate(FedAvg(), ("lora_A", "lora_C")).init(lora(), 0)
