"""Plans: rows, variants and what is refused, in one sentence each."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedloom.benchmark.plan import BenchPlan, read_plan
from fedloom.engines.engine_settings import InProcessSettings, RaySettings
from fedloom.recipe import RecipeError


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    """Return a maker of plans from keys."""

    def make(*overrides: str, **keys: Any) -> BenchPlan:
        file = tmp_path / "table.yaml"
        file.write_text(yaml.safe_dump(keys, sort_keys=False))
        return read_plan(file, overrides)

    return make


def test_a_method_is_a_recipe_or_settings_or_both(plan: Any) -> None:
    made = plan(
        "local.steps=3",
        settings={"run.rounds": 2, "local.steps": 5},
        methods={
            "plain": None,
            "prox": {"algorithm.fedavg.mu": 0.5},
            "adam": "fedadam",
            "both": {"recipe": "flasc", "settings": {"run.rounds": 4}},
        },
    )
    assert made.name == "table"
    recipes = {row: made.recipe_of(row, 7) for row in made.rows()}
    assert [recipe.run.rounds for recipe in recipes.values()] == [2, 2, 2, 4]
    assert recipes["prox"].algorithm.mu == 0.5
    assert recipes["adam"].algorithm.server.__class__.__name__ == "Adam"
    assert {type(recipe.algorithm).__name__ for recipe in recipes.values()} == {"FedAvg", "Flasc"}
    for row, recipe in recipes.items():
        assert (recipe.name, recipe.run.seed, recipe.data.seed) == (row, 7, 7)
        assert recipe.local.steps == 3
        assert recipe.run.baselines == ()


def test_every_method_is_crossed_with_every_variant(plan: Any) -> None:
    made = plan(
        methods={"FedAvg": None, "FedProx": {"algorithm.fedavg.mu": 0.5}},
        variants={"r2": {"tune.lora.rank": 2}, "r4": {"tune.lora.rank": 4}},
    )
    assert [*made.rows()] == ["FedAvg, r2", "FedAvg, r4", "FedProx, r2", "FedProx, r4"]
    assert made.recipe_of("FedProx, r4", 0).tune.rank == 4
    assert made.recipe_of("FedProx, r4", 0).algorithm.mu == 0.5
    assert made.reference == "FedAvg, r2"


def test_values_are_those_of_a_recipe_whatever_their_kind(plan: Any) -> None:
    made = plan(
        methods={
            "a": {
                "data.where": {"language": ["en", "no"]},
                "algorithm": [{"flasc": {"download": 0.25}}, "fedavg"],
                "local.lr": 1e-3,
                "data.source": "builtin:polyglot",
            }
        }
    )
    recipe = made.recipe_of("a", 0)
    assert recipe.data.where == {"language": ("en", "no")} or recipe.data.where == {
        "language": ["en", "no"]
    }
    assert recipe.local.lr == 1e-3


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "methods must name at least one row"),
        ({"methods": {"a": None}, "seeds": []}, "seeds must be whole numbers, each once"),
        ({"methods": {"a": None}, "seeds": [1, 1]}, "seeds must be whole numbers, each once"),
        ({"methods": {"a": None}, "seeds": [-1]}, "seeds must be at least 0, got -1"),
        ({"methods": {"a": None}, "seeds": ["x"]}, "seeds"),
        ({"methods": {"a": None}, "sed": [1]}, "unknown key 'sed' at the top (did you mean 'seeds'?)"),
        ({"methods": {"a": None}, "beside": "b"}, "beside must be one of a, local, centralised"),
        ({"methods": {"local": None}}, "two rows are called 'local': rename the method"),
        ({"methods": {"a/b": None, "a-b": None}}, "the folder of two rows would be 'a-b'"),
        ({"methods": {"baselines": None}}, "a run keeps its baselines in a folder of the name 'baselines': rename the row"),
        ({"methods": {"a": "quikstart"}}, "row 'a': no shipped recipe is called 'quikstart'"),
        ({"methods": {"a": {"run.rouds": 1}}}, "row 'a': unknown key 'rouds' in `run`"),
        ({"methods": {"a": {"run.seed": 1}}}, "run.seed is set by the plan's key `seeds`"),
        ({"methods": {"a": {"run.baselines": []}}}, "set by the plan's key `baselines`"),
        ({"methods": {"a": {"run": {"rounds": 2, "seed": 1}}}}, "run.seed is set by the plan's key `seeds`"),
        ({"methods": {"before training": None}}, "a row of every table is called 'before training'"),
        ({"methods": {"a": None}, "metrics": ["test/loss", "test/loss"]}, "metrics must be different ones"),
        ({"methods": {"a": 5}}, "methods.a must hold settings by name, got 5"),
        ({"methods": {"a": {"recipe": "flasc", "sets": {}}}}, "unknown key 'sets' in `methods.a`"),
        ({"methods": {"a": None}, "suites": {"boolq": {"limit": 3}}}, "suites.boolq must be a file, or have the key file"),
        ({"methods": {"a": None}, "suites": {"trivia": "x"}}, "suites.trivia: a suite must be one of"),
        ({"methods": {"a": None}, "suites": {"boolq": "x.jsonl"}}, "suites.boolq: the suite's file x.jsonl does not exist"),
        ({"methods": {"a": None}, "suites": {"boolq": {"file": "x", "limits": 1}}}, "unknown key 'limits' in `suites.boolq`"),
        ({"methods": {"a": {"engine": {"flower": {"nodes": 0}}}}}, "its clients are at sites that join"),
        ({"methods": {"a": None}, "baselines": ["random"]}, "baselines: random of 'a': run.baselines takes oracle and random where"),
        ({"methods": {"a": None}, "baselines": ["synchronous"]}, "baselines: synchronous of 'a': run.baselines takes synchronous with"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_plan_is_one_sentence(plan: Any, keys: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(**keys)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_that_is_no_yaml_or_no_file_is_one_sentence(tmp_path: Path, plan: Any) -> None:
    with pytest.raises(RecipeError, match="does not exist, or is a folder"):
        read_plan(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match="must hold sections such as `methods:`, got list"):
        read_plan(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("methods: [")
    with pytest.raises(RecipeError, match="is not YAML of a plan"):
        read_plan(tmp_path / "broken.yaml")
    with pytest.raises(RecipeError, match="an override must look like section"):
        plan("rounds", methods={"a": None})


def test_runs_of_another_task_do_not_pair(plan: Any) -> None:
    tiers = {"local.steps": 3, "data.tiers": {"weak": 0.5, "strong": 0.5}}
    when = {"evaluation.every": 0, "evaluation.before": False}
    more = {"evaluation.max_examples": 3}
    slow = {**tiers, "clock": {"tiers": {"weak": 10}}}
    ranks = {**tiers, "algorithm": "fedlora", "tune.lora.ranks": {"weak": 4}}
    methods = {"a": None, "b": {"data.num_examples": 400}, "c": tiers, "d": when, "e": more}
    methods |= {"f": slow, "g": ranks}
    made = plan(methods=methods)
    assert made.unlike("b", "a") == ["data"]
    assert made.unlike("c", "a") == []
    assert made.unlike("d", "a") == []
    # Other sections may name tiers.
    assert made.unlike("f", "a") == made.unlike("g", "a") == []
    assert made.unlike("e", "a") == ["evaluation"]
    # A baseline is of the first method's task.
    assert made.unlike("b", "local") == made.unlike("local", "b") == ["data"]
    assert made.unlike("c", "local") == []


def test_a_methods_own_settings_come_after_all_others(plan: Any) -> None:
    made = plan(
        "tune.lora.rank=2",
        settings={"tune": {"lora": {"rank": 4}}},
        methods={"a": None, "b": {"tune": {"lora": {"rank": 8}}}},
        variants={"v": {}, "w": {"tune.lora.rank": 3}},
    )
    assert {row: made.recipe_of(row, 0).tune.rank for row in made.rows()} == {
        "a, v": 2,
        "a, w": 3,
        "b, v": 8,
        "b, w": 3,
    }


def test_runs_go_where_a_plan_sends_them(plan: Any) -> None:
    made = plan(settings={"engine": "ray"}, methods={"a": None, "b": {"engine": "inprocess"}})
    assert isinstance(made.recipe_of("a", 0).engine, RaySettings)
    assert isinstance(made.recipe_of("b", 0).engine, InProcessSettings)


def test_the_plan_that_is_shown_can_be_run() -> None:
    file = Path(__file__).parents[2] / "examples/methods.yaml"
    made = read_plan(file)
    assert read_plan({"name": "methods", **yaml.safe_load(file.read_text())}) == made
    assert [*made.rows()] == ["FedAvg", "FedProx", "FedAdam", "FLASC"]
    assert {made.recipe_of(row, 1).run.rounds for row in made.rows()} == {8}
