from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.pfedme import PFedMe
from fedloom.algorithms.scaffold import Scaffold
from fedloom.core.protocols import Done

CENTERS = (1.0, -4.0, 6.0)


def test_the_personal_model_is_trained_after_the_shared_one(
    drive: Callable[..., Any], task: Any
) -> None:
    half = Ditto(FedAvg(), 0.3, steps=2).client_update(
        task(params=[1.0]), {"ditto": {"w": torch.tensor([5.0])}}
    )
    reply, client_state, (first, second) = drive(
        half, lambda fit: Done({"w": fit.start["w"] + 1}, 1, metrics={"loss": 2.0})
    )
    assert (float(first.start["w"]), float(second.start["w"])) == (1.0, 5.0)
    assert (second.proximal.strength, second.steps) == (0.3, 2)
    assert float(second.proximal.center["w"]) == 1.0  # the download, not what it was trained to
    assert float(client_state["ditto"]["w"]) == 6.0
    assert reply.metrics == {"loss": 2.0, "personal/loss": 2.0}
    assert float(reply.upload["delta"]["w"]) == 1.0


def test_parabolas_reach_the_analytic_fixed_point(world: Any, parabola: Any) -> None:
    """Shared at the mean of the centers, personal at (a + lambda shared) / (1 + lambda)."""
    strength, shared = 0.5, sum(CENTERS) / 3
    place = world(Ditto(FedAvg(), strength), [parabola(center=a) for a in CENTERS])
    place.play(150)
    assert float(place.state.params["w"]) == pytest.approx(shared, abs=1e-12)
    for i, a in enumerate(CENTERS):
        personal = (a + strength * shared) / (1 + strength)
        assert float(place.deployed(f"c{i}")["w"]) == pytest.approx(personal, abs=1e-9)


@pytest.mark.parametrize("inner", [FedAvg(mu=0.1), Scaffold()], ids=["fedprox", "scaffold"])
def test_what_is_shared_is_what_the_inner_algorithm_shares(
    inner: Any, world: Any, parabola: Any
) -> None:
    losses = [parabola(center=a) for a in CENTERS]
    with_ditto, without = world(Ditto(inner), losses), world(inner, losses)
    for place in (with_ditto, without):
        place.play(4)
    assert torch.equal(with_ditto.state.params["w"], without.state.params["w"])


def test_without_strength_the_personal_model_is_local_training(world: Any, parabola: Any) -> None:
    place = world(Ditto(FedAvg(), 0.0), [parabola(center=a) for a in CENTERS], steps=50)
    place.play(10)
    assert float(place.deployed("c2")["w"]) == pytest.approx(6.0, abs=1e-9)
    assert all(work.proximal is None for work in place.asked)


def test_the_memories_of_both_algorithms_stay_apart(world: Any, parabola: Any) -> None:
    place = world(Ditto(PFedMe()), [parabola(center=a) for a in CENTERS])
    place.play(2)
    assert set(place.memories["c0"]) == {"personal", "ditto"}


def test_a_client_without_memory_uses_what_the_inner_algorithm_deploys(task: Any) -> None:
    download = task(params=[3.0]).download
    assert Ditto(FedAvg()).deployed(download, {}) is download["params"]


def test_the_server_sees_what_the_inner_algorithm_shows_it() -> None:
    assert Ditto(Freeze(FedAvg())).server_sees == "mean"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": -0.1}, r"ditto\.strength must be >= 0, got -0\.1"),
        ({"steps": 0}, r"ditto\.steps must be at least 1 or left out, got 0"),
    ],
)
def test_settings_out_of_range_name_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ditto(FedAvg(), **fields)
