from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.payloads import NoReplies
from fedloom.core.protocols import Done, Reply, Round
from fedloom.server.optimizers import SGD, Adam, Momentum

ROUND = Round(1, 0, {"a": {}, "b": {}}, ("a", "b"), 1.0)


def test_a_client_sends_how_far_it_went(drive: Callable[..., Any], task: Any) -> None:
    half = FedAvg().client_update(task(params=[1.0, 2.0]), {})
    answer = Done({"w": torch.tensor([2.0, 4.0])}, 7, metrics={"loss": 0.5})
    reply, client_state, (fit,) = drive(half, lambda fit: answer)
    assert reply == Reply("c", reply.upload, 7, {"loss": 0.5})
    assert reply.upload["delta"]["w"].tolist() == [1.0, 2.0]
    assert fit.proximal is None
    assert client_state == {}


def test_fedprox_pulls_to_the_download(drive: Callable[..., Any], task: Any) -> None:
    given = task(params=[1.0])
    _, _, (fit,) = drive(
        FedAvg(mu=0.5).client_update(given, {}), lambda fit: Done({"w": torch.ones(1)}, 1)
    )
    assert fit.proximal.strength == 0.5
    assert fit.proximal.center is given.download["params"]


@pytest.mark.parametrize(("weighting", "expected"), [("examples", 0.75), ("uniform", 0.5)])
def test_clients_weigh_by_examples_or_alike(
    weighting: Any, expected: float, world: Any, parabola: Any
) -> None:
    losses = [parabola(center=0.0, num_examples=1), parabola(center=1.0, num_examples=3)]
    place = world(FedAvg(weighting=weighting), losses, lr=1.0, steps=1)
    place.play(1)
    assert float(place.state.params["w"]) == expected


def test_the_weighted_mean_of_bfloat16_uploads_is_taken_in_float32() -> None:
    uploads = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = [1.0 + 37 * n for n in range(40)]
    algorithm = FedAvg()
    state = algorithm.init({"w": torch.zeros(64)}, 0)
    replies = [
        Reply(str(n), {"delta": {"w": u}}, w)
        for n, (u, w) in enumerate(zip(uploads, weights, strict=True))
    ]
    state, _ = algorithm.server_update(state, ROUND, iter(replies))
    exact = (uploads.double() * torch.tensor(weights).double()[:, None]).sum(0) / sum(weights)
    assert state.params["w"].dtype is torch.float32
    assert torch.allclose(state.params["w"].double(), exact, rtol=1e-5, atol=1e-7)


def test_one_full_step_of_equal_clients_is_the_centralised_step(world: Any, parabola: Any) -> None:
    """The mean loss has the mean gradient."""
    losses = [parabola(center=a, curvature=h) for a, h in ((1.0, 2.0), (-3.0, 0.5), (4.0, 1.0))]
    place = world(FedAvg(), losses, lr=0.3, steps=1)
    place.play(4)
    w = 0.0
    for _ in range(4):
        w -= 0.3 * sum(loss.curvature * (w - loss.center) for loss in losses) / 3
    assert float(place.state.params["w"]) == pytest.approx(w, abs=1e-15)


def test_fedprox_takes_each_client_to_its_closed_form(world: Any, parabola: Any) -> None:
    """The minimum of (w - a)^2 / 2 + mu / 2 (w - g)^2 is (a + mu g) / (1 + mu)."""
    mu, g, centers = 0.5, 3.0, (1.0, -2.0)
    start = {"w": torch.full((1,), g, dtype=torch.float64)}
    place = world(FedAvg(mu=mu), [parabola(center=a) for a in centers], start, lr=0.3, steps=200)
    place.play(1)
    for reply, a in zip(place.replies, centers, strict=True):
        expected = (a + mu * g) / (1 + mu)
        assert g + float(reply.upload["delta"]["w"]) == pytest.approx(expected, abs=1e-14)


def test_the_first_step_of_fedprox_is_that_of_fedavg(world: Any, parabola: Any) -> None:
    """At the download the pull is zero."""
    losses = [parabola(center=1.0), parabola(center=-2.0, num_examples=5)]
    places = [world(FedAvg(mu=mu), losses, steps=1) for mu in (0.0, 0.7)]
    for place in places:
        place.play(1)
    assert torch.equal(places[0].state.params["w"], places[1].state.params["w"])


def test_fedprox_without_strength_is_fedavg(world: Any, parabola: Any) -> None:
    losses = [parabola(center=1.0), parabola(center=-2.0, num_examples=5)]
    places = [world(algorithm, losses) for algorithm in (FedAvg(mu=0.0), FedAvg())]
    for place in places:
        place.play(5)
    assert torch.equal(places[0].state.params["w"], places[1].state.params["w"])
    assert places[0].asked == places[1].asked or all(f.proximal is None for f in places[0].asked)


@pytest.mark.parametrize(
    "server", [SGD(0.5), Momentum(0.3), Adam(0.2)], ids=["sgd", "momentum", "adam"]
)
def test_a_server_optimizer_reaches_the_optimum_of_the_mean(
    server: Any, world: Any, parabola: Any
) -> None:
    losses = [parabola(center=1.0), parabola(center=3.0)]
    place = world(FedAvg(server, weighting="uniform"), losses, lr=0.1, steps=1)
    place.play(500)
    assert float(place.state.params["w"]) == pytest.approx(2.0, abs=0.02)


def test_a_round_without_replies_is_no_round() -> None:
    algorithm = FedAvg()
    state = algorithm.init({"w": torch.zeros(1)}, 0)
    with pytest.raises(NoReplies, match="no client replied"):
        algorithm.server_update(state, ROUND, iter(()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mu": -1}, r"fedavg\.mu must be >= 0, got -1"),
        ({"mu": float("nan")}, r"fedavg\.mu must be >= 0, got nan"),
        ({"weighting": "size"}, r"fedavg\.weighting must be examples or uniform, got 'size'"),
    ],
)
def test_settings_out_of_range_name_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedAvg(**fields)
