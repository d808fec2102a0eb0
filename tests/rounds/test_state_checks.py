from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedloom.algorithms import ALGORITHMS, WRAPPERS
from fedloom.algorithms.decomfl import DeComFL
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedbiot import FedBiOT
from fedloom.algorithms.fedem import FedEM
from fedloom.algorithms.fedex import FedEx
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.algorithms.private import Private
from fedloom.core.arms import Arm
from fedloom.rounds.state_checks import models_in, state_fault
from fedloom.server.public import PublicText


@dataclass(frozen=True)
class Model:
    params: Any
    moments: Any = field(default_factory=dict)


@dataclass(frozen=True)
class Nest:
    inner: Any
    centers: Any = field(default_factory=dict)


def at(value: float, **moments: Any) -> Model:
    return Model({"w": torch.full((4,), value)}, moments)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_model_of_every_algorithm_is_found_in_its_state(name: str) -> None:
    kind: Any = ALGORITHMS[name]
    if kind is Private:
        algorithm: Any = Private(FedAvg(), 1.0, noise_multiplier=1.0, noise_seed=1, delta=0.1)
    elif kind is FedBiOT:
        algorithm = FedBiOT(FedAvg(), PublicText("builtin:polyglot"))
    elif kind is FedEx:
        algorithm = FedEx(FedAvg(), (Arm(lr=1.0), Arm(lr=0.5)))
    else:
        algorithm = kind(FedAvg()) if name in WRAPPERS else kind()
    seeds = kind in (FedKSeed, DeComFL)
    start = {"coefficients": torch.ones(8, dtype=torch.float64)}
    start = start if seeds else {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 2)}
    models = list(models_in(algorithm.init(start, 0)))
    assert models
    assert len(models) == (2 if kind is FedEM else 1)
    assert all(set(model) <= set(start) and model for model in models)


def test_a_model_may_move_as_far_as_the_bound() -> None:
    assert state_fault(at(0), at(5), most=10) is None
    assert (
        state_fault(at(0), at(6), most=10)
        == "the model moved by 12, above run.max_update_norm (10)"
    )
    assert state_fault(Nest(at(0)), Nest(at(-6)), most=10) is not None
    assert state_fault(at(0), at(6), most=float("inf")) is None


def test_of_several_models_each_is_held_against_the_nearest_there_was() -> None:
    before = Nest(at(0), {1: at(100), 2: at(200)})
    assert state_fault(before, Nest(at(0), {3: at(101), 4: at(199)}), most=10) is None
    assert state_fault(before, Nest(at(0), {1: at(100), 2: at(150)}), most=10) is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nothing_in_a_state_may_stop_being_finite(bad: float) -> None:
    one = torch.tensor([1.0, bad])
    for after in (
        Model({"w": one}),
        at(0, v={"w": one}),
        at(0, rows=[one]),
        Nest(at(0), {1: Model({"w": one})}),
    ):
        assert state_fault(at(0), after, most=float("inf")) == "the new state is not finite"
