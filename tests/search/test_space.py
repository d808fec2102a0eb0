"""Spaces: values, grids and what is refused, in one sentence each."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import fedloom
from fedloom.recipe import RecipeError, apply_overrides, read_tree
from fedloom.search.space import Choice, Range, Tried, read_search

LR = {"local.lr": {"low": 1e-3, "high": 1e-2, "log": True}}


def test_a_grid_is_every_combination_the_last_fastest() -> None:
    search = read_search(
        {
            "space": {
                "local.steps": {"low": 2, "high": 6, "step": 2},
                "local.optimizer": ["sgd", "adamw"],
            },
            "sampler": "grid",
        }
    )
    assert search.settings == {
        "local.steps": Range(2, 6, step=2),
        "local.optimizer": Choice(("sgd", "adamw")),
    }
    assert [tuple(each.values()) for each in search.grid()] == [
        (steps, optimizer) for steps in "246" for optimizer in ("sgd", "adamw")
    ]
    rates = read_search(
        {"space": {"local.lr": {"low": 0.1, "high": 0.3, "step": 0.1}}, "sampler": "grid"}
    )
    assert [float(each["local.lr"]) for each in rates.grid()] == pytest.approx([0.1, 0.2, 0.3])


def test_a_value_may_be_a_whole_section() -> None:
    search = read_search(
        {"space": {"algorithm": ["fedavg", {"fedavg": {"server": {"adam": {"lr": 0.003}}}}]}}
    )
    tried = Tried.of(apply_overrides(read_tree("quickstart"), []), search)
    made = [
        tried.trial(0, {"algorithm": text}).algorithm
        for text in search.settings["algorithm"].grid("")
    ]
    assert [type(each.server).__name__ for each in made] == ["SGD", "Adam"]  # type: ignore[attr-defined] # both are FedAvg


def test_a_trial_has_the_recipes_seeds_and_nothing_beside_the_run() -> None:
    tried = Tried.of(
        apply_overrides(read_tree("quickstart"), ["run.seed=7"]), read_search({"space": LR})
    )
    made, best = tried.trial(3, {"local.lr": "0.001"}), tried.best({"local.lr": "0.001"})
    assert (made.name, made.local.lr, made.run.seed, made.run.baselines, made.run.samples) == (
        "trial-3",
        0.001,
        7,
        (),
        0,
    )
    assert (best.name, best.local.lr, best.run.baselines) == ("quickstart-tuned", 0.001, ("local",))


def test_the_example_is_a_search(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "examples/space.yaml"
    search = read_search(file)
    assert search.halving
    Tried.of(apply_overrides(read_tree("quickstart"), []), search)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"space": {}}, "space must name at least one setting"),
        (
            {"space": {"data.num_clients": [2, 4]}},
            "space.data.num_clients must be a setting of algorithm, local, tune or wire",
        ),
        (
            {"space": {"run.rounds": [2, 4]}},
            "all trials have the same model, data, cohorts, rounds",
        ),
        (
            {"space": {"cohort.uniform.size": [2, 4]}},
            "space.cohort.uniform.size must be a setting of",
        ),
        (
            {"space": {"local.lr": [0.1]}},
            r"space.local.lr must list two or more different values, got \[0.1\]",
        ),
        ({"space": {"local.lr": [0.1, 0.1]}}, "two or more different values"),
        ({"space": {"local.lr": 0.1}}, "must be a list of values, or a range such as"),
        (
            {"space": {"local.lr": {"low": 1.0, "high": 1.0}}},
            "space.local.lr must have low below high, got 1.0 and 1.0",
        ),
        (
            {"space": {"local.lr": {"low": 0.0, "high": 1.0, "log": True}}},
            "with log must have low above 0",
        ),
        (
            {"space": {"local.lr": {"low": 0.1, "hihg": 1.0}}},
            "unknown key 'hihg' in `space.local.lr`",
        ),
        (
            {"space": {"local.lr": {"low": 0.1, "high": 0.2, "step": 1}}},
            "space.local.lr.step must be above 0 and at most",
        ),
        (
            {"space": {"local.steps": {"low": 1, "high": 8, "step": 2}}},
            "space.local.steps.high must be reached from low by steps of 2, got 1 and 8",
        ),
        (
            {"space": {"tune.lora.rank": [2, 4], "tune": ["lora", "ia3"]}},
            "space.tune.lora.rank has no effect before space.tune, which sets all of that",
        ),
        (
            {"space": LR, "hyperband": {"min_rounds": 5}},
            "hyperband compares trials before their end, and eta 3 with min_rounds 5 leaves no round",
        ),
        (
            {"space": {"local.lrr": [1, 2]}},
            "space.local.lrr: unknown key 'lrr' in `local`",
        ),
        (
            {"space": {"local.lr": [0.1, -1.0]}},
            "space.local.lr: local.lr must be positive, got -1.0",
        ),
        ({"space": {"algorithm.ditto.strength": [0.1, 1]}}, "has no layer 'ditto'"),
        ({"space": LR}, "a search by tpe needs trials: N, or budget"),
        ({"space": LR, "sampler": "grid"}, "space.local.lr has no end of values for sampler grid"),
        (
            {"space": LR, "sampler": "annealing"},
            "sampler: input should be 'tpe', 'random' or 'grid'",
        ),
        ({"space": LR, "trials": 0}, "trials must be at least 1, got 0"),
        ({"space": LR, "trials": 3, "hyperband": {}}, "trials has no effect beside hyperband"),
        (
            {"space": LR, "successive_halving": None, "hyperband": None},
            "are two ways: leave one of them out",
        ),
        ({"space": LR, "successive_halving": {"eta": 1}}, "eta must be at least 2"),
        (
            {"space": {"local.lr": [0.1, 0.2]}, "sampler": "grid", "trials": 2},
            "trials has no effect with sampler grid",
        ),
        (
            {"space": LR, "trials": 1, "budget": {"rounds": 13}},
            "budget.rounds is enough for 13 rounds, and what is asked for takes 14",
        ),
        (
            {"space": LR, "budget": {"rounds": 13}},
            "budget.rounds is enough for 13 rounds, and the least search takes 14",
        ),
        (
            {"space": LR, "budget": {"rounds": 13}, "successive_halving": None},
            "and the least search takes 14",
        ),
        ({"space": LR, "budget": {}}, r"budget must be \{rounds: N\} or \{bytes: N\}, one of them"),
        ({"space": LR, "budget": {"rounds": 0}}, "budget.rounds must be above 0, got 0"),
        (
            {"space": LR, "trials": 1, "objective": "test/loss"},
            "objective must be of the validation split",
        ),
        (
            {"space": LR, "trials": 1, "objective": "validation/num_tokens"},
            "of which one way is better",
        ),
        (
            {"space": LR, "trials": 1, "objective": "validation/exact_match"},
            "objective validation/exact_match is not measured, as answers are written to test rows alone",
        ),
        ({"space": LR, "trials": 1, "seed": -1}, "seed must be at least 0"),
    ],
)
def test_a_space_that_cannot_be_searched_is_one_sentence(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(keys, sort_keys=False))
    with pytest.raises(ValueError, match=message) as caught:
        fedloom.tune("quickstart", file, tmp_path / "search")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "search").exists()


def test_a_recipe_without_validation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not measured where evaluation"):
        fedloom.tune(
            "quickstart",
            {"space": LR, "trials": 1},
            tmp_path,
            overrides=["evaluation.validation=false"],
        )
