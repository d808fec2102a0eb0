"""An emulator beside any algorithm: sent along, moved by the server alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedbiot import FedBiOT
from fedloom.algorithms.scaffold import Scaffold
from fedloom.client.local_settings import LocalSettings
from fedloom.core.emulation import Aligns
from fedloom.core.params import equal
from fedloom.core.protocols import Done, Fit, Job, Proximal, Round, Task
from fedloom.recipe import RecipeError, build_recipe
from fedloom.recipe_text import to_tree
from fedloom.server.optimizers import SGD, AdamW
from fedloom.server.public import PublicText
from fedloom.spaces.lora import LoRA
from fedloom.spaces.offsite import Offsite
from fedloom.testing.bench import make_bench

PUBLIC = PublicText("builtin:polyglot")
NAMES = [f"model.layers.{i}.mlp.lora_{x}.weight" for i in (0, 1, 10, 11) for x in "AB"]


def start() -> dict[str, torch.Tensor]:
    return {name: torch.full((2,), float(at)) for at, name in enumerate(NAMES)}


def of_layers(*numbers: int) -> set[str]:
    return {name for name in NAMES if int(name.split(".")[2]) in numbers}


def fedbiot(inner: Any = None, **settings: Any) -> FedBiOT[Any]:
    return FedBiOT(inner or FedAvg(), PUBLIC, **{"left": 1, "right": 1, **settings})


@pytest.mark.parametrize("inner", [FedAvg(mu=0.5), Scaffold()], ids=["fedprox", "scaffold"])
def test_the_inner_algorithm_knows_the_ends_alone_and_the_factors_rest_at_clients(
    inner: Any,
) -> None:
    algorithm = fedbiot(inner)
    state = algorithm.init(start(), 0)
    assert set(state.others) == of_layers(1, 10)
    assert set(state.inner.params) == of_layers(0, 11)
    round = Round(1, 0, {"a": {}}, ("a",), 1.0)
    sent = algorithm.broadcast(state, round)["a"]
    assert set(sent["params"]) == set(NAMES)
    half = algorithm.client_update(Task("train", 1, "a", 0, {}, sent), {})
    work = next(half)
    assert isinstance(work, Fit)
    assert work.mask is not None
    assert {name for name, mask in work.mask.items() if not mask.any()} == of_layers(1, 10)
    with pytest.raises(StopIteration) as end:
        half.send(Done({n: t + 1 for n, t in work.start.items()}, 3, 2, 0.2))
    reply, _ = end.value.value
    assert all(set(group) == of_layers(0, 11) for group in reply.upload.values())
    after, _ = algorithm.server_update(state, round, [reply])
    assert equal(after.others, state.others)
    assert not equal(after.inner.params, state.inner.params)


def test_what_a_client_uses_are_its_layers_around_the_emulator_as_it_was_sent() -> None:
    algorithm = fedbiot()
    state = algorithm.init(start(), 0)
    sent = algorithm.broadcast(state, Round(1, 0, {"a": {}}, ("a",), 1.0))["a"]
    assert equal(algorithm.deployed(sent, {}), start())


def test_a_step_goes_against_the_gradient_and_the_next_one_remembers_it() -> None:
    algorithm = fedbiot(optimizer=SGD(0.5))
    state = algorithm.init(start(), 0)
    slope = {name: torch.ones(2) for name in of_layers(1, 10)}
    moved = algorithm.moved(state, slope)
    assert equal(algorithm.factors(moved), {n: t - 0.5 for n, t in state.others.items()})
    assert equal(moved.inner.params, state.inner.params)
    remembering = fedbiot(optimizer=AdamW(0.1, weight_decay=0.0))
    once = remembering.moved(remembering.init(start(), 0), slope)
    twice = remembering.moved(once, {n: torch.zeros(2) for n in slope})
    assert (once.moments.num_steps, twice.moments.num_steps) == (1, 2)
    assert all((twice.others[n] < once.others[n]).all() for n in slope)


def test_the_pull_to_what_was_sent_has_a_gradient(tiny_llama: Callable[..., Any]) -> None:
    """The second step differs by exactly lr * mu times how far the first one went."""
    lr, mu = 0.5, 0.2
    local = LocalSettings(optimizer="sgd", lr=lr, batched="off", max_grad_norm=None)
    tune = Offsite(left=1, right=1, adapter=LoRA(rank=2))
    model = tiny_llama(layers=4, dtype=torch.float64).requires_grad_(False)
    bench = make_bench(tune, local, dtype=torch.float64, model=model)
    begin = bench.space.start()

    def learnt(steps: int, pull: float) -> Any:
        proximal = Proximal(pull, begin) if pull else None
        job = Job("c3", 1, 7, Fit(begin, proximal=proximal, steps=steps))
        return bench.trainer.run([job])[0].params

    first, free, pulled = learnt(1, 0.0), learnt(2, 0.0), learnt(2, mu)
    went = 0.0
    for name, at in begin.items():
        step = first[name] - at
        went += float(step.abs().sum())
        assert torch.allclose(free[name] - pulled[name], lr * mu * step, atol=1e-9)
    assert went > 0


def test_a_recipe_fills_in_which_layers_are_whose_and_reads_itself_back() -> None:
    layers: list[Any] = [{"fedbiot": {"public": {"source": "builtin:polyglot"}}}, "fedavg"]
    tune = {"offsite": {"left": 3, "right": 2, "factors": 4}}
    recipe = build_recipe({"name": "x", "algorithm": layers, "tune": tune})
    algorithm = recipe.algorithm
    assert isinstance(algorithm, FedBiOT)
    assert isinstance(algorithm, Aligns)
    assert (algorithm.left, algorithm.right) == (3, 2)
    assert build_recipe(to_tree(recipe)) == recipe
    with pytest.raises(RecipeError, match="unknown key 'left'"):
        build_recipe({"name": "x", "algorithm": [{"fedbiot": {"left": 1}}, "fedavg"], "tune": tune})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"before": -1}, r"fedbiot\.before must be at least 0, got -1"),
        ({"batch_size": 0}, r"fedbiot\.batch_size must be at least 1"),
        ({"before": 0, "steps": 0}, "without a step leave fedbiot"),
        ({"match": "l1"}, "must be l2, cosine or layers, got 'l1'"),
        ({"hidden": 0.0, "kd": 0.0}, "one is above 0, got 0"),
        ({"temperature": 0.0}, "must be positive"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fedbiot(**settings)
    with pytest.raises(ValueError, match=r"fedbiot\.public\.source must name text"):
        PublicText("")
