from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.core.protocols import ClientError
from fedloom.models.build import Base, ModelSettings, load_base
from fedloom.models.quantized import quantize_
from fedloom.models.schemes import SCHEMES
from fedloom.spaces.handshake import agree
from fedloom.spaces.seed_space import Seeds, SeedSpace
from fedloom.spaces.spilled import STRETCH, SpilledVector

NAME = "coefficients"


@pytest.fixture
def space(tiny_llama: Callable[..., Any]) -> Callable[..., SeedSpace]:
    """Return a maker: `space(seed=1, decays=False, model={}, **tune)`."""

    def make(
        seed: int = 1, decays: bool = False, model: dict[str, Any] | None = None, **tune: Any
    ) -> SeedSpace:
        base: Any = Base(tiny_llama(**(model or {})).requires_grad_(False), None, "random")
        settings = Seeds(**{"num_seeds": 16, "distribution": "rademacher", **tune})
        return settings.make_space(base, seed=seed, decays=decays)

    return make


def at(space: SeedSpace, **coefficients: float) -> dict[str, Any]:
    params = dict(space.start())
    for k, c in coefficients.items():
        params[NAME][int(k[1:])] = c
    return params


def test_the_start_is_the_base_model_and_so_is_a_return_to_it(space: Any) -> None:
    one = space()
    before = one.values.clone()
    one.load(at(one, k3=0.1))
    assert not torch.equal(one.values, before)
    one.load(one.start())
    assert torch.equal(one.values, before)
    assert one.start()[NAME].shape == (16,)


def test_only_named_tensors_move(space: Any) -> None:
    one = space(weights=["mlp", "layers.0.input_layernorm"])
    assert "model.layers.0.input_layernorm.weight" in one.directions.shapes
    assert "model.layers.1.input_layernorm.weight" not in one.directions.shapes
    before = {name: p.clone() for name, p in one.model.named_parameters()}
    one.load(at(one, k3=0.1))
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in one.directions.shapes)


def test_sides_that_move_other_tensors_or_stand_on_others_are_refused(space: Any) -> None:
    one, other = space(weights=["mlp"]), space(weights=["self_attn"])
    with pytest.raises(ClientError, match="tensors that move"):
        agree(one.identity(), other.identity())
    same = space(weights=["mlp"])
    agree(one.identity(), same.identity())
    moved = space(weights=["mlp"])
    with torch.no_grad():
        moved.model.lm_head.weight[0, 0] += 1
    assert moved.identity()["base"] != one.identity()["base"]


def test_weights_that_are_not_there_and_decay_of_some_are_refused(space: Any) -> None:
    with pytest.raises(
        ValueError, match=r"tune.seeds.weights must name parts .* no tensor has norms"
    ):
        space(weights=["norms"])
    with pytest.raises(ValueError, match=r"local.weight_decay must be 0 where"):
        space(weights=["mlp"], decays=True)


def test_params_say_how_far_each_direction_goes(space: Any) -> None:
    one = space(decays=True)
    base = one.values.double().clone()
    params = at(one, k3=0.1, k9=-0.25)
    params["base"] = torch.tensor(-0.5, dtype=torch.float64)
    one.load(params)
    for name, live in one.seated.layout.split(one.values).items():
        wanted = one.seated.layout.split(base)[name] * 0.5
        wanted = wanted + 0.1 * one.directions.z(name, 3) - 0.25 * one.directions.z(name, 9)
        torch.testing.assert_close(live.double(), wanted, rtol=1e-6, atol=1e-7)
        assert one.tensors[name].data_ptr() == live.data_ptr()


@pytest.mark.parametrize("distribution", ["rademacher", "popcount"])
def test_a_rebuild_forgets_the_way_that_led_there(space: Any, distribution: str) -> None:
    """After other loads, after a walk's changes, from what was kept or from nothing."""
    one, other = space(distribution=distribution), space(distribution=distribution)
    here, there = at(one, k1=1e-3, k2=-2e-3), at(one, k1=1e-3, k2=-2e-3, k7=5e-4)
    one.load(here)
    one.load(there)
    one.values.add_(1.0)
    one.load(there)
    other.load(there)
    assert torch.equal(one.values, other.values)
    one.load(here)
    one.load({NAME: here[NAME].float()})
    other.load({NAME: here[NAME].float().double()})
    assert torch.equal(one.values, other.values)


def test_equal_sides_agree_and_others_are_told_why(space: Any) -> None:
    """Weights, order of tensors, stream, distribution and pool, before anything is trained."""
    ours = space().identity()
    moved = space()
    moved.load(at(moved, k1=0.5))
    agree(ours, moved.identity())
    others = {
        "weights of the base model": space(model={"seed": 1}).identity(),
        "weights of the base mode": space(model={"dtype": torch.bfloat16}).identity(),
        "distribution of the directions": space(distribution="gaussian").identity(),
        "number of directions": space(num_seeds=17).identity(),
        "seed of the directions": space(seed=2).identity(),
        "version of the random stream": {**ours, "noise": "0"},
        "names and order of the tensors that move": {**ours, "tensors": "0"},
    }
    for said, theirs in others.items():
        with pytest.raises(
            ClientError, match=rf"both sides must have the same {said}.*: here .*, there "
        ):
            agree(ours, theirs)
    with pytest.raises(ClientError, match=r"the same wings: here none, there two"):
        agree(ours, {**ours, "wings": "two"})
    assert (
        space(distribution="lowrank", distribution_rank=2).identity()["distribution"] == "lowrank 2"
    )


def test_params_of_another_space_are_refused(space: Any) -> None:
    one = space()
    with pytest.raises(ValueError, match=r"params differ from the space in \['base'\]"):
        one.load({**one.start(), "base": torch.zeros(())})
    with pytest.raises(ValueError, match=r"coefficients must have shape \(16,\), got \(17,\)"):
        one.load({NAME: torch.zeros(17)})


def test_a_saved_model_is_a_plain_one(tiny_folder: Path, tmp_path: Path) -> None:
    base = load_base(ModelSettings(str(tiny_folder), device="cpu"))
    one: Any = Seeds(num_seeds=8).make_space(base, seed=1)
    params = at(one, k2=0.02)
    one.save(tmp_path / "out", params)
    again = load_base(ModelSettings(str(tmp_path / "out"), device="cpu"))
    ids = torch.arange(8)[None]
    torch.testing.assert_close(again.model(input_ids=ids).logits, one.model(input_ids=ids).logits)


def test_quantised_layers_follow_their_coefficients_and_are_saved_whole(
    tiny_folder: Path, tmp_path: Path
) -> None:
    base = load_base(ModelSettings(str(tiny_folder), device="cpu", quantize="int8"))
    one: Any = Seeds(num_seeds=8, distribution="lowrank").make_space(base, seed=1)
    ids = torch.arange(8)[None]
    still = one.model(input_ids=ids).logits
    params = at(one, k2=0.02, k5=-0.01)
    one.save_merged(tmp_path / "out", params)
    moved = one.model(input_ids=ids).logits
    assert float((moved - still).norm()) > 0.1
    again = load_base(ModelSettings(str(tmp_path / "out"), device="cpu"))
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(again.model(input_ids=ids).logits, moved, **close)
    one.load(one.start())
    assert torch.equal(one.model(input_ids=ids).logits, still)
    assert one.identity()["distribution"] == "lowrank 1"


def test_weights_of_several_types_are_refused(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama().requires_grad_(False)
    model.lm_head.to(torch.bfloat16)
    base: Any = Base(model, None, "random")
    with pytest.raises(ValueError, match=r"weights of one type, got bfloat16 and float32"):
        Seeds().make_space(base, seed=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_seeds": 0}, r"tune.seeds.num_seeds must be at least 1, got 0"),
        (
            {"distribution": "cauchy"},
            r"tune.seeds.distribution must be auto, gaussian, .*, got cauchy",
        ),
        (
            {"distribution": "lowrank", "distribution_rank": 0},
            r"tune.seeds.distribution_rank must be at least 1, got 0",
        ),
        (
            {"distribution_rank": 2},
            r"distribution_rank belongs to tune.seeds.distribution lowrank, got auto",
        ),
        ({"weights": "mlp"}, r"tune.seeds.weights must be a list, got mlp"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Seeds(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_vector_is_read_as_it_was_written(dtype: torch.dtype) -> None:
    size = STRETCH // dtype.itemsize + 5
    values = torch.arange(size, dtype=torch.float32).remainder(251).to(dtype)
    kept = SpilledVector.of(values)
    assert torch.equal(kept.read(torch.empty_like(values)), values)
    assert torch.equal(kept.read(torch.empty(size)), values.float())
    kept.write(-values)
    assert torch.equal(kept.read(torch.empty_like(values)), -values)
    assert [s.stop - s.start for s in kept.stretches()] == [size - 5, 5]


def test_a_quantised_base_has_an_identity_of_its_own(tiny_llama: Callable[..., Any]) -> None:
    made = []
    for quantised in (False, True, True):
        model = tiny_llama().requires_grad_(False)
        if quantised:
            quantize_(model, SCHEMES["int8"])
        base: Any = Base(model, None, "random")
        one: Any = Seeds(num_seeds=4, distribution="lowrank").make_space(base, seed=0)
        one.load(at(one, k1=0.1))
        made.append(one.identity()["base"])
    assert made[0] != made[1] == made[2]
