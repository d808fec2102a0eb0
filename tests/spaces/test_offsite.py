"""First and last layers that learn around an emulator."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedbiot import FedBiOT
from fedloom.models.build import Base, fingerprint
from fedloom.models.hf_logging import quiet
from fedloom.recipe import RecipeError, build_recipe
from fedloom.recipe_text import to_tree
from fedloom.server.public import PublicText
from fedloom.spaces.full import Full
from fedloom.spaces.lora import LoRA
from fedloom.spaces.offsite import Offsite, OffsiteSpace

IDS = torch.arange(20).view(2, 10) + 3
KINDS = [LoRA(rank=2), Full()]


def space_of(model: Any, tokenizer: Any = None, **settings: Any) -> OffsiteSpace:
    given = {"left": 2, "right": 1, "adapter": LoRA(rank=2), **settings}
    base = Base(model.requires_grad_(False), tokenizer, "a/model")
    return Offsite(**given).make_space(base, seed=1)


def moved(space: Any, by: float = 0.1) -> dict[str, torch.Tensor]:
    """Return coordinates away from the start."""
    draw = torch.Generator().manual_seed(0)
    start = space.start()
    return {name: t + by * torch.randn(t.shape, generator=draw) for name, t in start.items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("adapter", KINDS, ids=["lora", "full"])
def test_what_learns_is_in_the_first_and_last_layers_by_their_number_in_the_whole_model(
    adapter: Any, tiny_llama: Callable[..., Any]
) -> None:
    space = space_of(tiny_llama(layers=8), adapter=adapter)
    assert {int(name.split(".")[2]) for name in space.start()} == {0, 1, 7}
    assert {name for name, p in space.model.named_parameters() if p.requires_grad}
    assert all(name.startswith("model.layers.") for name in space.start())


@pytest.mark.parametrize("adapter", KINDS, ids=["lora", "full"])
def test_what_was_learnt_fits_the_whole_model_by_name_in_any_order(
    adapter: Any, tiny_llama: Callable[..., Any]
) -> None:
    space = space_of(tiny_llama(layers=8), adapter=adapter)
    names = list(space.start())
    params = moved(space)
    space.load(params)
    with space.whole():
        expected = logits(space.model)
    random.Random(0).shuffle(names)
    space.load({name: params[name] for name in names})
    with space.whole():
        assert torch.equal(logits(space.model), expected)


@pytest.mark.parametrize("adapter", KINDS, ids=["lora", "full"])
def test_a_folder_of_what_was_learnt_is_the_whole_model_for_others(
    adapter: Any, tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    size = {"layers": 8, "vocab": len(tiny_tokenizer)}
    space = space_of(tiny_llama(**size), tiny_tokenizer, adapter=adapter, factors=2)
    params = moved(space)
    space.save(tmp_path / "saved", params)
    space.load(params)
    with space.whole():
        expected = logits(space.model)
    if isinstance(adapter, Full):
        other: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    else:
        with quiet():
            other = PeftModel.from_pretrained(tiny_llama(**size), tmp_path / "saved")
    assert torch.allclose(logits(other.eval()), expected, atol=1e-6)
    space.save_merged(tmp_path / "merged", params)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.num_hidden_layers == 8
    assert torch.allclose(logits(merged), expected, atol=1e-5)


def test_factors_of_the_emulator_are_no_part_of_the_whole_model(
    tiny_llama: Callable[..., Any],
) -> None:
    space = space_of(tiny_llama(layers=8), factors=2)
    adapters, factors = space.split(space.start())
    assert {int(n.split(".")[2]) for n in factors} == {2, 6}
    assert {int(n.split(".")[2]) for n in adapters} == {0, 1, 7}
    before = logits(space.model)
    with space.whole():
        whole = logits(space.model)
    space.load({**adapters, **{n: t + 0.1 for n, t in factors.items()}})
    assert not torch.allclose(logits(space.model), before)
    with space.whole():
        assert torch.equal(logits(space.model), whole)


def test_weights_that_no_client_moves_stay_as_they_are(tiny_llama: Callable[..., Any]) -> None:
    space = space_of(tiny_llama(layers=8))
    before = fingerprint(space.model)
    space.load(moved(space))
    assert fingerprint(space.model) == before
    with space.whole():
        assert fingerprint(space.model) != before


@pytest.mark.parametrize("adapter", KINDS, ids=["lora", "full"])
def test_the_start_follows_from_the_seed_whoever_has_the_middle(
    adapter: Any, tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    from fedloom.models.build import ModelSettings, load_base

    size = {"layers": 8, "vocab": len(tiny_tokenizer)}
    settings = Offsite(left=2, right=1, adapter=adapter, factors=2)
    here = settings.make_space(Base(tiny_llama(**size).requires_grad_(False), None, "x"), seed=1)
    model = tiny_llama(**size).requires_grad_(False)
    settings.make_space(Base(model, tiny_tokenizer, "x"), seed=2).save_emulator(tmp_path)
    there = settings.make_space(load_base(ModelSettings(name=str(tmp_path))), seed=1)
    assert here.identity() == there.identity()
    assert torch.equal(logits(here.model), logits(there.model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"left": -1}, r"tune\.offsite\.left must be at least 0, got -1"),
        ({"left": 0, "right": 0}, "no layer would learn"),
        ({"drop": 1.0}, r"tune\.offsite\.drop must be in \[0, 1\), got 1"),
        ({"rule": "ceil"}, "got ceil"),
        ({"adapter": LoRA(ranks={"phone": 2}), "factors": 2}, "ranks must be left out where"),
        ({"adapter": LoRA(init="pissa")}, "init must be kaiming"),
        ({"adapter": Full(["mlp"])}, r"adapter\.full\.weights must be left out"),
        ({"adapter": LoRA(modules_to_save=["norm"])}, "modules_to_save must be left out"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Offsite(**settings)


def test_int8_beside_int8_has_no_effect(tiny_llama: Callable[..., Any]) -> None:
    from fedloom.models.quantized import quantize_
    from fedloom.models.schemes import SCHEMES

    model = tiny_llama(layers=8)
    quantize_(model, SCHEMES["int8"])
    with pytest.raises(ValueError, match=r"tune\.offsite\.int8 has no effect"):
        space_of(model, int8=True)


def test_targets_that_are_in_no_layer_that_learns_are_refused(
    tiny_llama: Callable[..., Any],
) -> None:
    with pytest.raises(ValueError, match="linear layers of the first and last layers"):
        space_of(tiny_llama(layers=8), adapter=LoRA(targets=["layers.6.mlp.up_proj"]))


def test_factors_are_no_wider_than_a_layer(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match=r"tune\.offsite\.factors must be at most \d+, the size of"
    ):
        space_of(tiny_llama(layers=8), factors=1000)


def test_where_the_emulator_s_factors_end_must_show_in_the_last_layer(
    tiny_llama: Callable[..., Any],
) -> None:
    first = LoRA(rank=2, targets=["layers.0.mlp.up_proj"])
    with pytest.raises(ValueError, match=r"layer of the last layer too where tune\.offsite"):
        space_of(tiny_llama(layers=8), adapter=first, factors=2)
    space = space_of(tiny_llama(layers=8), adapter=first, factors=2, right=0)
    learnt, factors = space.split(space.start())
    found = FedBiOT(FedAvg(), PublicText("builtin:polyglot"), left=2).split(space.start())
    assert [set(part) for part in found] == [set(learnt), set(factors)]
    assert learnt


def test_a_recipe_names_the_adapter_and_reads_itself_back() -> None:
    tune = {"offsite": {"left": 1, "right": 3, "adapter": {"full": {}}}}
    recipe = build_recipe({"name": "x", "tune": tune})
    assert recipe.tune == Offsite(1, 3, adapter=Full())
    assert build_recipe(to_tree(recipe)) == recipe
    assert build_recipe({"name": "x", "tune": {"offsite": {}}}).tune.title == (
        "offsite, 2 + 2 layers around 50 % of the middle, lora, rank 8"
    )


def test_a_refusal_names_the_adapter_where_it_stands() -> None:
    wrong = {"offsite": {"adapter": {"lora": {"rank": 0}}}}
    with pytest.raises(RecipeError, match=r"^tune\.offsite\.adapter\.lora\.rank must be at least"):
        build_recipe({"name": "r", "algorithm": "fedavg", "tune": wrong})


def test_factors_need_an_algorithm_that_moves_them() -> None:
    with pytest.raises(RecipeError, match=r"tune\.offsite\.factors has no effect"):
        build_recipe({"name": "x", "tune": {"offsite": {"factors": 4}}})
    public = {"public": {"source": "builtin:polyglot"}}
    inside: list[Any] = ["ditto", {"fedbiot": public}, "fedavg"]
    with pytest.raises(RecipeError, match="before all others in the list"):
        build_recipe({"name": "x", "tune": {"offsite": {"factors": 4}}, "algorithm": inside})
    with pytest.raises(RecipeError, match="set tune to offsite with factors"):
        build_recipe({"name": "x", "algorithm": [{"fedbiot": public}, "fedavg"]})
    with pytest.raises(RecipeError, match="set tune to offsite with factors"):
        build_recipe({"name": "x", "tune": "offsite", "algorithm": [{"fedbiot": public}, "fedavg"]})
