"""Mixtures of components."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedem import FedEM, responsibilities
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.private import Private
from fedloom.algorithms.scaffold import Scaffold
from fedloom.clustering.given import Random
from fedloom.core.description import check, describe
from fedloom.core.protocols import Evaluate, Fit, Losses, Reply, Round, Task
from fedloom.core.rehearsal import client_half, rehearse
from fedloom.core.sparsity import Density
from fedloom.recipe import load_recipe
from fedloom.server.optimizers import Adam


def test_an_example_is_of_a_component_as_its_share_times_its_likelihood_says() -> None:
    shares = torch.tensor([0.8, 0.2], dtype=torch.float64)
    losses = torch.tensor([[1.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
    found = responsibilities(losses, shares, 1.0)
    # .8 e^-1 / (.8 e^-1 + .2 e^-2) and .8 e^-3 / (.8 e^-3 + .2 e^-1)
    assert found[0].tolist() == pytest.approx([0.915776, 0.351214], abs=1e-6)
    assert found.sum(0).tolist() == pytest.approx([1.0, 1.0], abs=1e-15)
    assert found.mean(1).tolist() == pytest.approx([0.633495, 0.366505], abs=1e-6)
    # .8 e^-.5 / (.8 e^-.5 + .2 e^-1) at a temperature of 2
    assert float(responsibilities(losses, shares, 2.0)[0, 0]) == pytest.approx(0.868332, abs=1e-6)


def test_equal_losses_leave_the_shares_as_they_are() -> None:
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found = responsibilities(torch.full((3, 4), 7.0, dtype=torch.float64), shares, 1.0)
    assert torch.allclose(found, shares[:, None].expand(3, 4), atol=1e-15)
    # Sums of many tokens, far below what exp can hold.
    assert bool(responsibilities(torch.full((3, 4), 5e4), shares, 1.0).isfinite().all())


@pytest.mark.parametrize("inner", [FedAvg(mu=0.1), FedAvg(Adam()), Scaffold()])
def test_one_component_is_the_inner_algorithm_to_the_bit(
    inner: Any, world: Any, parabola: Any
) -> None:
    losses = [parabola(1.0, num_examples=3), parabola(3.0), parabola(-2.0, 2.0)]
    ours, plain = world(FedEM(inner, 1), losses), world(inner, losses)
    for _ in range(4):
        ours.play(1)
        plain.play(1)
        assert torch.equal(ours.state.components[0].params["w"], plain.state.params["w"])
        assert torch.equal(ours.deployed("c0")["w"], plain.deployed("c0")["w"])
    assert all(isinstance(work, Fit) and work.example_weights is None for work in ours.asked)


def test_every_component_is_trained_on_all_examples_by_how_well_it_explains_them(
    world: Any, parabola: Any
) -> None:
    place = world(FedEM(FedAvg()), [parabola(1.0, num_examples=2), parabola(-3.0)])
    place.play(1)
    first = place.asked[:4]
    assert [type(work) for work in first] == [Losses, Losses, Fit, Fit]
    a, b = (work.example_weights for work in first[2:])
    losses = [(float(work.params["w"]) - 1.0) ** 2 / 2 for work in first[:2]]
    share = 1 / (1 + math.exp(losses[0] - losses[1]))
    assert a.tolist() == pytest.approx([share, share])
    assert (a + b).tolist() == pytest.approx([1.0, 1.0])
    kept = place.memories["c0"]["mixture"]["shares"]
    assert kept.tolist() == pytest.approx([share, 1 - share])


def test_what_a_client_is_a_mixture_of_stays_with_it(world: Any, parabola: Any) -> None:
    place = world(FedEM(FedAvg(), 3), [parabola(1.0), parabola(-3.0)])
    place.play(2)
    for reply in place.replies:
        assert set(reply.upload) == {"delta"}
        assert {name[:2] for name in reply.upload["delta"]} == {"1.", "2.", "3."}
        assert reply.weight == 1.0
        assert not [name for name in reply.metrics if "mixture" in name]


def test_components_part_by_what_they_explain(world: Any, parabola: Any) -> None:
    losses = [parabola(4.0), parabola(4.1), parabola(-4.0), parabola(-4.1)]
    place = world(FedEM(FedAvg(), spread=0.1), losses)
    place.play(30)
    ends = sorted(float(each.params["w"]) for each in place.state.components)
    assert ends == pytest.approx([-4.05, 4.05], abs=0.2)
    tops = [int(place.memories[f"c{i}"]["mixture"]["shares"].argmax()) for i in range(4)]
    assert tops[0] == tops[1] != tops[2] == tops[3]
    assert float(place.deployed("c0")["w"]) == pytest.approx(4.05, abs=0.2)


def test_what_is_measured_is_the_mixture_and_what_is_deployed_its_largest_part(
    world: Any, parabola: Any
) -> None:
    algorithm = FedEM(FedAvg(), 3)
    place = world(algorithm, [parabola(1.0)])
    place.play(1)
    memory = {"mixture": {"shares": torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)}}
    download = place.downloads["c0"]
    task = Task("test", 2, "c0", 0, {}, download)
    work = next(client_half(algorithm, task, memory))
    assert isinstance(work, Evaluate)
    assert torch.equal(work.params["w"], download["params"]["2.w"])
    assert work.share == 0.5
    assert [share for share, _ in work.beside] == [0.2, 0.3]
    assert torch.equal(work.beside[1][1]["w"], download["params"]["3.w"])
    assert torch.equal(algorithm.deployed(download, memory)["w"], download["params"]["2.w"])
    assert torch.equal(algorithm.deployed(download, {})["w"], download["params"]["1.w"])


def test_a_metric_is_a_mean_of_the_components_that_tell_it() -> None:
    class Telling(FedAvg):
        def server_update(self, state: Any, round: Any, replies: Any) -> Any:
            state, told = FedAvg.server_update(self, state, round, replies)
            start = float(state.params["w"].sum())
            return state, {**told, "all": start, **({"some": 7.0} if start > 1 else {})}

    algorithm = FedEM(Telling())
    state = algorithm.init({"w": torch.ones(1)}, 0)
    delta = {f"{at}.w": torch.full((1,), float(at) - 1) for at in (1, 2)}
    reply = Reply("a", {"delta": delta})
    after, told = algorithm.server_update(state, Round(1, 0, {"a": {}}, ("a",), 1.0), [reply])
    ends = [float(each.params["w"]) for each in after.components]
    assert ends[0] <= 1 < ends[1]
    assert told["all"] == pytest.approx(sum(ends) / 2)
    assert told["some"] == 7.0


@pytest.mark.parametrize(
    "around",
    [lambda a: Private(a, clip=1.0, noise_multiplier=1.0), lambda a: Flasc(a, Density(0.5))],
)
def test_private_and_flasc_hand_the_mixture_on(around: Any) -> None:
    algorithm = around(FedEM(FedAvg()))
    params = {"w": torch.arange(4.0)}
    download = {"params": {f"{at}.w": t + at for at in (1, 2) for t in params.values()}}
    mixture = algorithm.mixture(download, {})
    assert [share for share, _ in mixture] == [0.5, 0.5]
    assert describe(algorithm).components == 2
    assert around(FedAvg()).mixture(download, {}) == ()


def test_a_rehearsal_needs_no_examples(world: Any, parabola: Any) -> None:
    algorithm = FedEM(Scaffold())
    place = world(algorithm, [parabola(1.0)])
    place.play(1)
    task = Task("train", 2, "c0", 0, {}, place.downloads["c0"])
    wanted = {g: {n: t.shape for n, t in p.items()} for g, p in place.replies[0].upload.items()}
    upload = rehearse(algorithm, task).upload
    assert {g: {n: t.shape for n, t in p.items()} for g, p in upload.items()} == wanted


def test_a_loss_that_is_not_finite_leaves_the_shares_alone(world: Any, parabola: Any) -> None:
    place = world(FedEM(FedAvg()), [parabola(math.inf)])
    with pytest.raises(Exception, match="the loss of one of its examples is not finite"):
        place.play(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": 0}, "fedem.components must be from 1 to 8, got 0"),
        ({"components": 9}, "fedem.components must be from 1 to 8, got 9"),
        ({"temperature": 0.0}, "fedem.temperature must be above 0, got 0"),
        (
            {"spread": 0.0},
            "fedem.spread must be above 0, as components that begin alike stay alike",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FedEM(FedAvg()), **changes)


def test_what_it_cannot_wrap_or_be_in_is_refused() -> None:
    with pytest.raises(ValueError, match="write private before fedem"):
        FedEM(Private(FedAvg(), clip=1.0, noise_multiplier=1.0))
    with pytest.raises(ValueError, match="fedem cannot be in itself"):
        FedEM(FedEM(FedAvg()))
    recipe = load_recipe("fedem")
    with pytest.raises(ValueError, match=r"clustered\.mode must be given or random .*, got auto"):
        replace(recipe, algorithm=FedEM(Ditto(Clustered(FedAvg()))))
    for algorithm in (FedEM(Clustered(FedAvg(), Random(2))), FedEM(Clustered(FedAvg()), 1)):
        replace(recipe, algorithm=algorithm)
    for outer in (Freeze, Clustered):
        name = outer.__name__.lower()
        with pytest.raises(ValueError, match=f"write {name} after it in the list"):
            check(outer(FedEM(FedAvg())), recipe, num_clients=None)
    check(FedEM(Freeze(FedAvg())), recipe, num_clients=None)
    with pytest.raises(ValueError, match="fedem needs the whole model at its clients"):
        replace(load_recipe("fedot"), algorithm=FedEM(FedAvg()))
    with pytest.raises(ValueError, match="fedem needs adapters or weights to be tuned"):
        FedEM(FedAvg()).init({"coefficients": torch.zeros(4, dtype=torch.float64)}, 0)
