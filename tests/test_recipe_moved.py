import pytest
import yaml

from fedloom.recipe import RecipeError, build_recipe, load_recipe


@pytest.mark.parametrize(
    ("tune", "says", "write"),
    [
        ({"rank": 16, "alpha": 32}, "tune.rank is now tune.lora.rank", {"rank": 16, "alpha": 32}),
        ({"space": "lora", "dora": True}, "tune.dora is now tune.lora.dora", {"dora": True}),
        (
            {"targets": ("q_proj",)},
            "tune.targets is now tune.lora.targets",
            {"targets": ["q_proj"]},
        ),
        ({"lora": {"rank": 3}, "alpha": 4.0}, "tune.alpha is now tune.lora.alpha", None),
    ],
)
def test_a_key_of_old_is_answered_with_the_section_to_write(tune, says: str, write) -> None:
    write = {"lora": write or {"alpha": 4.0, "rank": 3}}
    with pytest.raises(RecipeError) as refused:
        build_recipe({"name": "x", "tune": tune})
    said, _, text = str(refused.value).partition(": write ")
    assert said == says
    assert yaml.safe_load(text) == {"tune": write}
    build_recipe({"name": "x", **yaml.safe_load(text)})


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (
            {"space": "seeds", "num_seeds": 64, "law": "lowrank", "law_rank": 2},
            r"tune.num_seeds is now tune.seeds.num_seeds: write tune: \{seeds: \{num_seeds: 64,"
            r" distribution: lowrank, distribution_rank: 2\}\}$",
        ),
        ({"law": "popcount"}, r"tune.law is now .* \{seeds: \{distribution: popcount\}\}$"),
        ({"space": "full"}, r"tune.space is now the key of the section: write tune: full$"),
        ({"space": "full", "weights": ["mlp"]}, r"write tune: \{full: \{weights: \[mlp\]\}\}$"),
        ({"space": "seeds", "weights": ["mlp"]}, r"write tune: \{seeds: \{weights: \[mlp\]\}\}$"),
        ({"space": "full", "origin": "zero"}, r"write tune: \{full: \{origin: zero\}\}$"),
        # The recipe.yaml of a run held every key of every kind.
        (
            {"space": "seeds", "rank": 8, "num_seeds": 5},
            r"write tune: \{seeds: \{num_seeds: 5\}\}$",
        ),
        (
            {"space": "boft"},
            r"the key of the section, one of lora, lora_xs, prompt, prefix, ptuning, ia3, vera, offsite, full, seeds: got 'boft'$",
        ),
        (
            {"space": ["lora"]},
            r"the key of the section, one of lora, lora_xs, prompt, prefix, ptuning, ia3, vera, offsite, full, seeds: got \['lora'\]$",
        ),
    ],
)
def test_the_section_to_write_is_of_the_kind_that_was_meant(tune, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe({"name": "x", "tune": tune})


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("quickstart", "tune.rank=4", r"tune.rank is now tune.lora.rank: write tune.lora.rank=4$"),
        ("quickstart", "tune.space=full", r"tune.space is now tune: write tune=full$"),
        ("quickstart", "tune.law=popcount", r"write tune.seeds.distribution=popcount$"),
        ("quickstart", "tune.origin=zero", r"write tune.lora.origin=zero$"),
        ("full", "tune.origin=zero", r"write tune.full.origin=zero$"),
        ("full", "tune.weights=[mlp]", r"write tune.full.weights=\[mlp\]$"),
        ("fedkseed", "tune.weights=[mlp]", r"write tune.seeds.weights=\[mlp\]$"),
        ("fedkseed", "tune.law_rank=2", r"write tune.seeds.distribution_rank=2$"),
    ],
)
def test_an_override_of_old_is_answered_with_the_one_to_write(
    recipe: str, override: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, [override])


def test_a_key_that_never_was_has_not_moved() -> None:
    with pytest.raises(RecipeError, match=r"tune: unknown name 'rnak'"):
        build_recipe({"name": "x", "tune": {"rnak": 3}})
    with pytest.raises(RecipeError, match=r"unknown key 'law' in `tune.seeds`"):
        build_recipe({"name": "x", "tune": {"seeds": {"law": "gaussian"}}})
