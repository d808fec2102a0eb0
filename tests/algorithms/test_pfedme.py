from collections.abc import Callable
from typing import Any

import pytest

from fedloom.algorithms.pfedme import PFedMe
from fedloom.core.protocols import Done

CLIENTS = [(0.0, 1.0), (2.0, 3.0), (7.0, 0.5)]  # center, curvature


def test_a_round_is_several_solves_and_one_message(drive: Callable[..., Any], task: Any) -> None:
    half = PFedMe(local_rounds=4).client_update(task(params=[1.0]), {})
    reply, client_state, asked = drive(half, lambda fit: Done({"w": fit.start["w"] + 1}, 1))
    assert [float(fit.start["w"]) for fit in asked] == [1.0, 2.0, 3.0, 4.0]
    assert set(reply.upload) == {"delta"}
    assert float(client_state["personal"]["w"]) == 5.0


@pytest.mark.parametrize("local_rounds", [1, 4])
@pytest.mark.parametrize("server_mix", [1.0, 0.5])
def test_parabolas_reach_the_analytic_fixed_point(
    local_rounds: int, server_mix: float, world: Any, parabola: Any
) -> None:
    """The inner minimum is (h a + lambda w) / (h + lambda), so one outer step takes w - a to rho (w - a) with
    rho = 1 - eta lambda h / (h + lambda), and the mean stands still where sum (1 - rho^R) (w - a) = 0.
    """
    strength, lr = 2.0, 0.25
    algorithm = PFedMe(strength, lr, local_rounds, server_mix)
    place = world(
        algorithm, [parabola(center=a, curvature=h) for a, h in CLIENTS], lr=0.2, steps=35
    )
    place.play(320 // local_rounds)
    pulls = [1 - (1 - lr * strength * h / (h + strength)) ** local_rounds for _, h in CLIENTS]
    shared = sum(p * a for p, (a, _) in zip(pulls, CLIENTS, strict=True)) / sum(pulls)
    assert float(place.state.params["w"]) == pytest.approx(shared, abs=1e-9)
    for i, (a, h) in enumerate(CLIENTS):
        rho = 1 - lr * strength * h / (h + strength)
        local = a + rho ** (local_rounds - 1) * (shared - a)  # where the last solve was anchored
        personal = (h * a + strength * local) / (h + strength)
        assert float(place.deployed(f"c{i}")["w"]) == pytest.approx(personal, abs=1e-9)


def test_a_new_client_uses_the_shared_model(task: Any) -> None:
    download = task(params=[3.0]).download
    assert PFedMe().deployed(download, {}) is download["params"]


@pytest.mark.parametrize("field", ["strength", "lr", "server_mix"])
def test_rates_that_are_not_positive_name_themselves(field: str) -> None:
    rates: dict[str, Any] = {field: -0.5}
    with pytest.raises(ValueError, match=rf"pfedme\.{field} must be a positive number, got -0\.5"):
        PFedMe(**rates)


def test_a_round_without_solves_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pfedme\.local_rounds must be at least 1, got 0"):
        PFedMe(local_rounds=0)
