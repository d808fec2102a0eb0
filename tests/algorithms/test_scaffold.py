from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.algorithms.scaffold import Scaffold
from fedloom.core.protocols import Done

SLOPES = (0.5, -1.5, 4.0)


def test_a_client_remembers_its_mean_gradient(drive: Callable[..., Any], task: Any) -> None:
    half = Scaffold().client_update(task(params=[0.0], control=[1.0]), {})
    reply, client_state, (fit,) = drive(
        half, lambda fit: Done({"w": torch.tensor([-2.0])}, 5, 4, lr_sum=2.0)
    )
    assert fit.gradient_offset["w"].tolist() == [1.0]
    assert client_state["control"]["w"].tolist() == [0.0]  # 0 - 1 + 2 / 2
    assert reply.upload["control_delta"]["w"].tolist() == [0.0]
    assert reply.weight == 1.0


def test_constant_directions_are_learnt_in_one_round(world: Any, parabola: Any) -> None:
    """After round 1 every c_i is its client's direction and c is their mean."""
    place = world(Scaffold(), [parabola(curvature=0.0, slope=u) for u in SLOPES], lr=0.1, steps=7)
    place.play(1)
    learnt = [float(place.memories[f"c{i}"]["control"]["w"]) for i in range(3)]
    assert learnt == pytest.approx(SLOPES, abs=1e-15)
    assert float(place.state.control["w"]) == pytest.approx(1.0, abs=1e-15)


def test_in_the_second_round_all_clients_end_at_the_same_point(world: Any, parabola: Any) -> None:
    """By the equations: g - K lr mean(u)."""
    place = world(Scaffold(), [parabola(curvature=0.0, slope=u) for u in SLOPES], lr=0.1, steps=7)
    place.play(2)
    for reply in place.replies:
        assert float(reply.upload["delta"]["w"]) == pytest.approx(-7 * 0.1 * 1.0, abs=1e-14)


def test_scaffold_reaches_the_optimum_that_fedavg_drifts_from(world: Any, parabola: Any) -> None:
    losses = [parabola(center=0.0, curvature=4.0), parabola(center=1.0, curvature=0.5)]
    optimum = 0.5 / 4.5  # of the mean loss
    place = world(Scaffold(), losses, lr=0.1, steps=10)
    place.play(200)
    assert float(place.state.params["w"]) == pytest.approx(optimum, abs=1e-9)


def test_weighted_clients_reach_the_optimum_of_the_weighted_loss(world: Any, parabola: Any) -> None:
    losses = [
        parabola(center=0.0, curvature=4.0, num_examples=1),
        parabola(center=1.0, curvature=0.5, num_examples=3),
    ]
    place = world(Scaffold(weighting="examples"), losses, lr=0.1, steps=10)
    place.play(200)
    assert float(place.state.params["w"]) == pytest.approx(1.5 / 5.5, abs=1e-9)


def test_the_control_moves_by_the_share_of_clients_that_were_drawn(
    world: Any, parabola: Any
) -> None:
    place = world(Scaffold(), [parabola(curvature=0.0, slope=u) for u in (1.0, 2.0, 3.0, 4.0)])
    place.play(1, ["c0", "c1"])
    assert float(place.state.control["w"]) == pytest.approx(0.5 * 1.5, abs=1e-15)


def test_a_client_that_took_no_step_keeps_its_control(drive: Callable[..., Any], task: Any) -> None:
    given = task(params=[1.0], control=[2.0])
    half = Scaffold().client_update(given, {"control": {"w": torch.tensor([3.0])}})
    reply, client_state, _ = drive(
        half, lambda fit: Done({"w": torch.tensor([1.0])}, 5, lr_sum=0.0)
    )
    assert client_state["control"]["w"].tolist() == [3.0]
    assert reply.upload["control_delta"]["w"].tolist() == [0.0]


def test_steps_that_are_no_gradients_are_refused(world: Any, parabola: Any) -> None:
    place = world(Scaffold(), [parabola()], gradient=False)
    with pytest.raises(ValueError, match=r"local\.optimizer must be sgd without momentum"):
        place.play(1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"server_lr": 0}, r"scaffold\.server_lr must be a positive number, got 0"),
        ({"weighting": "size"}, r"scaffold\.weighting must be examples or uniform, got 'size'"),
    ],
)
def test_settings_out_of_range_name_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scaffold(**fields)
