from collections.abc import Callable
from typing import Any

import pytest

from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.models.build import Base
from fedloom.models.quantized import quantize_
from fedloom.models.schemes import SCHEMES
from fedloom.recipe import RecipeError, build_recipe, load_recipe
from fedloom.recipe_text import to_tree
from fedloom.spaces.full import Full
from fedloom.spaces.lora import LoRA
from fedloom.spaces.offsite import Offsite
from fedloom.spaces.seed_space import Seeds
from fedloom.spaces.tune import TUNES, Tune


@pytest.fixture(params=list(TUNES))
def kind(request: pytest.FixtureRequest) -> str:
    """Return each kind in turn."""
    name: str = request.param
    return name


@pytest.fixture
def tune(kind: str) -> Tune:
    """Return it as it is by default; around a middle, where there is one, that two layers have room for."""
    return Offsite(left=1, right=0) if kind == "offsite" else TUNES[kind]()


def test_a_kind_is_written_by_its_name_alone_or_with_settings(kind: str) -> None:
    tune = TUNES[kind]()
    fields = to_tree(build_recipe({"name": "x", "tune": kind}))["tune"][kind]
    ways: list[Any] = [kind, {kind: {}}, {kind: None}, {kind: fields}]
    for written in ways:
        assert build_recipe({"name": "x", "tune": written}).tune == tune


@pytest.mark.parametrize(
    ("tune", "title"),
    [(LoRA(rank=4), "lora, rank 4"), (Full(), "full"), (Seeds(), "4,096 seeds")],
)
def test_a_report_calls_a_kind_by_what_tells_most(tune: Tune, title: str) -> None:
    assert tune.title == title


def test_a_space_starts_at_the_base_model(tune: Tune, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama().requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    space = tune.make_space(Base(model, None, "random"), seed=1)
    assert (COEFFICIENTS in space.start()) == tune.is_seed_space
    space.load(space.start())
    now = {name.replace(".base_layer", ""): p for name, p in space.model.named_parameters()}
    assert all(bool((now[name] == p).all()) for name, p in before.items())
    assert space.left_frozen == ""


def test_a_base_of_integers_is_trained_beside_or_refused(
    tune: Tune, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama().requires_grad_(False)
    quantize_(model, SCHEMES["int8"])
    base = Base(model, None, "random")
    if tune.is_adapter or tune.is_seed_space:
        assert tune.make_space(base, seed=0).start()
    else:
        with pytest.raises(ValueError, match=r"model\.quantize"):
            tune.make_space(base, seed=0)


def test_lora_is_what_a_recipe_learns_that_says_nothing() -> None:
    assert build_recipe({"name": "x"}).tune == LoRA()


@pytest.mark.parametrize(
    ("overrides", "tune"),
    [
        (["tune.lora.rank=4"], LoRA(rank=4, alpha=32, targets="all-linear")),
        (["tune=lora", "tune.lora.rank=4"], LoRA(rank=4)),
        (["tune=full"], Full()),
        (["tune=full", "tune.full.weights=[mlp]"], Full(weights=("mlp",))),
        (["tune={seeds: {num_seeds: 64}}"], Seeds(num_seeds=64)),
        (["tune=seeds", "tune.seeds.distribution=popcount"], Seeds(distribution="popcount")),
    ],
)
def test_an_override_of_the_kind_leaves_nothing_of_the_other(
    overrides: list[str], tune: Tune
) -> None:
    assert load_recipe("quickstart", overrides).tune == tune


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tune.full.weights=[mlp]"], r"tune must be one of .*; the override tune=full first"),
        (
            ["tune=loha"],
            r"tune: unknown name 'loha' .*; known: lora, lora_xs, prompt, prefix, ptuning, ia3, vera, offsite, full",
        ),
        (["tune=full", "tune.full.rank=4"], r"unknown key 'rank' in `tune\.full`"),
        (["tune=seeds", "tune.seeds.origin=zero"], r"unknown key 'origin' in `tune\.seeds`"),
        (["tune.lora.weights=[mlp]"], r"unknown key 'weights' in `tune\.lora`"),
        (["tune.lora.rank=0"], r"tune\.lora\.rank must be at least 1, got 0"),
        (
            ["tune={}"],
            r"tune must be one of lora, .*, full, seeds, or one \{name: settings\}, got \{\}",
        ),
    ],
)
def test_settings_of_another_kind_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", overrides)
