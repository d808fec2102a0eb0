"""Objects in the place of sections: what is wrong with one is a sentence, and what was given is named in recipe.yaml."""

import dataclasses
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from fedloom import experiment
from fedloom.algorithms.fedavg import FedAvg
from fedloom.cli import app
from fedloom.client.setup import TrainerParts
from fedloom.core.protocols import Done, Job, Trainer
from fedloom.data.encoding import Tokenizer
from fedloom.data.federation import federate
from fedloom.objects import Objects, recipe_with
from fedloom.recipe import RecipeError, load_recipe
from fedloom.result import open_run
from fedloom.rounds.recipe_settings import Recipe

Make = Callable[..., Any]
ROWS = [{"prompt": f"Name {i}", "completion": f"code {i * 7 % 13}"} for i in range(12)]
DATA = {"north": ROWS, "south": ROWS[::-1]}


class Thawed(FedAvg):
    """A class of its own that can be imported: its import path is its name."""


@dataclass
class Changeable:
    server_sees = init = broadcast = client_update = deployed = server_update = None


class Unset:
    server_sees = init = broadcast = client_update = deployed = server_update = None


@dataclass(frozen=True)
class Counting:
    """The package's own trainer, counted."""

    inner: Trainer
    jobs: list[Job]

    @property
    def width(self) -> int:
        return self.inner.width

    def run(self, jobs: Sequence[Job]) -> Sequence[Done]:
        self.jobs.extend(jobs)
        return self.inner.run(jobs)


def usual(parts: TrainerParts) -> Trainer:
    return parts.default


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"algorithm": FedAvg},
            r"algorithm must be an object, got the class FedAvg: give FedAvg\(\)",
        ),
        (
            {"algorithm": "fedavg"},
            r"algorithm must have the methods of fedloom\.Algorithm, got a str without",
        ),
        ({"algorithm": Changeable()}, "algorithm must be a frozen dataclass.* got a Changeable"),
        ({"algorithm": Unset()}, "algorithm must be a frozen dataclass.* got a Unset"),
        ({"data": ROWS}, r"data must map clients to rows, .* got list"),
        ({"data": "rows.jsonl"}, r"data must map clients .* got str; a file .* is data\.source"),
        ({"data": {}}, "data must map at least one client to rows"),
        ({"data": {3: ROWS}}, "data must be keyed by the names of clients, got 3"),
        ({"data": {"a": 5}}, r"data\['a'\] must be rows, each a dict, got int"),
        ({"data": {"a": iter(ROWS)}}, r"data\['a'\] can be read only once, got list_iterator"),
        ({"data": {"a": "none.jsonl"}}, r"data\['a'\] names a file .* not exist: none\.jsonl"),
        (
            {"data": {"a": {"training": ROWS}}},
            r"data\['a'\] must be rows, or rows by split .*, got training",
        ),
        ({"data": {"a": {"train": 5}}}, r"data\['a'\]\['train'\] must be rows"),
        (
            {"model": "builtin:tiny"},
            r"model must be a pair .*got 'builtin:tiny': a name .* model\.name",
        ),
        (
            {"model": torch.nn.Linear(1, 1)},
            "model must be a pair .* got a Linear alone: give its tokenizer too",
        ),
        ({"model": (1, 2)}, r"model must be a pair .* got \(int, int\)"),
        ({"model": 5}, "model must be a pair .* got int"),
        ({"trainer": 5}, "trainer must be a Trainer .* or a function that makes one, got int"),
        (
            {"metrics": [len]},
            r"each of metrics must be a fedloom\.Metric, .* got builtin_function_or_method",
        ),
        (
            {"callbacks": ["stop"]},
            "each of callbacks must be a function of a finished round, got str",
        ),
    ],
)
def test_a_wrong_object_is_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Objects(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": lambda: 5}, "model must be a pair .* got int"),
        ({"trainer": lambda parts: 5}, r"trainer .*<lambda> must return a Trainer, .* got int"),
        ({"data": {"a": [*ROWS, "text"]}}, r"data\['a'\], row 13 must be a dict, got str"),
        ({"data": {"a": []}}, r"data\['a'\] has no rows"),
        ({"data": {"a": [{**ROWS[0], "client": "b"}]}}, "has a column 'client' of its own"),
        ({"data": {"a": [{"text": "no pair"}]}}, r"data\['a'\], row 1"),
    ],
)
def test_what_turns_out_wrong_when_it_is_used_is_a_sentence_and_leaves_no_run(
    given: dict[str, Any], message: str, small_recipe: Make, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        experiment.run(small_recipe(), tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "given", "message"),
    [
        (
            ["data.num_clients=3"],
            {"data": DATA},
            r"data\.num_clients has no effect where data is given",
        ),
        (
            ["model.dtype=bfloat16"],
            {"model": tuple},
            r"model\.dtype has no effect where model is given",
        ),
        (
            ["algorithm.fedavg.mu=1"],
            {"algorithm": FedAvg()},
            r"algorithm\.fedavg\.mu has no effect",
        ),
        (
            ["engine=ray"],
            {"data": DATA},
            "engine must be inprocess or loopback where data is an object",
        ),
        (
            ["data.fractions=[1,0,0]"],
            {"data": {"a": {"train": ROWS}}},
            r"data\.fractions has no effect",
        ),
    ],
)
def test_a_setting_without_effect_beside_an_object_is_refused(
    overrides: list[str], given: dict[str, Any], message: str
) -> None:
    if given.get("model") is tuple:
        given = {"model": lambda: ()}
    with pytest.raises(RecipeError, match=message):
        recipe_with("quickstart", overrides, Objects(**given))


def test_a_recipe_that_is_none_is_a_sentence() -> None:
    with pytest.raises(RecipeError, match=r"recipe must be .* or a Recipe, got dict"):
        experiment.run({"name": "x"})  # type: ignore[arg-type]


def test_what_was_given_is_named_in_the_recipe_by_module_and_name(small_recipe: Make) -> None:
    objects = Objects(
        algorithm=Thawed(mu=0.5), data=DATA, model=lambda: None, trainer=Counting, callbacks=[print]
    )
    recipe = recipe_with(small_recipe(), (), objects)
    here = __name__
    assert recipe.algorithm == Thawed(mu=0.5)
    assert recipe.objects == {
        "data": "builtins:dict",
        "model": f"{here}:{test_what_was_given_is_named_in_the_recipe_by_module_and_name.__name__}.<locals>.<lambda>",
        "trainer": f"{here}:Counting",
        "callbacks": "builtins:print",
    }
    assert recipe.data.source == "python:builtins:dict"
    assert recipe.data.where == {}


def test_without_objects_a_recipe_is_as_it_was(small_recipe: Make) -> None:
    recipe: Recipe = small_recipe()
    assert recipe_with(recipe, (), Objects()) == recipe
    assert recipe_with("scaffold", ["run.rounds=2"], Objects()) == load_recipe(
        "scaffold", ["run.rounds=2"]
    )


@pytest.fixture(scope="module")
def begun(small_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a run of two rounds whose rows and trainer only Python has."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    recipe = small_recipe(run={"rounds": 1, "samples": 0})
    experiment.run(recipe, folder, data=DATA, trainer=usual)
    return folder


def test_the_command_line_says_which_function_goes_on(begun: Path) -> None:
    done = CliRunner().invoke(app, ["resume", str(begun), "run.rounds=2"])
    assert isinstance(done.exception, ValueError)
    said = str(done.exception)
    assert "was begun from Python with objects of its own, data (builtins:dict)" in said
    assert f'fedloom.run("{begun / "recipe.yaml"}", "{begun}", data=..., trainer=...)' in said
    done = CliRunner().invoke(app, ["evaluate", str(begun)])
    assert f'fedloom.open_run("{begun}", data=...)' in str(done.exception)


def test_a_later_command_that_reads_no_rows_needs_none(begun: Path) -> None:
    done = CliRunner().invoke(app, ["chat", str(begun), "--prompt", "Name 3"])
    assert done.exit_code == 0, done.exception
    assert open_run(begun, data=DATA).evaluate().clients.keys() == DATA.keys()


def test_other_rows_are_refused_as_from_a_file(begun: Path) -> None:
    other = {**DATA, "south": ROWS}
    with pytest.raises(ValueError, match=r"has changed: split of the data"):
        experiment.run(begun / "recipe.yaml", begun, data=other, trainer=usual)


def test_an_algorithm_that_cannot_be_imported_is_asked_for(
    small_recipe: Make, tmp_path: Path
) -> None:
    @dataclass(frozen=True)
    class Inner(FedAvg):
        pass

    folder = tmp_path / "run"
    recipe = small_recipe(run={"rounds": 1, "samples": 0})
    result = experiment.run(recipe, folder, algorithm=Inner(mu=0.5))
    (layer,) = yaml.safe_load((folder / "recipe.yaml").read_text())["algorithm"]
    assert next(iter(layer)).endswith("<locals>.Inner")
    assert layer[next(iter(layer))]["mu"] == 0.5
    for command in ("resume", "chat"):
        done = CliRunner().invoke(app, [command, str(folder)])
        assert "an algorithm that cannot be imported" in str(done.exception)
    assert result.evaluate().round == 1
    assert experiment.run(folder / "recipe.yaml", folder, algorithm=Inner(mu=0.5)).summary == (
        json.loads((folder / "summary.json").read_text())
    )


def test_a_setting_that_yaml_cannot_hold_is_a_sentence(small_recipe: Make, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Odd(FedAvg):
        odd: Any = None

    with pytest.raises(ValueError, match=r"Odd has a field that recipe\.yaml cannot hold"):
        experiment.run(small_recipe(), tmp_path / "run", algorithm=Odd(odd=torch.zeros(2)))
    assert not (tmp_path / "run").exists()


def test_a_trainer_of_ones_own_does_the_work(small_recipe: Make, tmp_path: Path) -> None:
    jobs: list[Job] = []

    def counting(parts: TrainerParts) -> Trainer:
        return Counting(parts.default, jobs)

    recipe = small_recipe(run={"rounds": 1, "samples": 0})
    plain = experiment.run(recipe, tmp_path / "plain").summary
    own = experiment.run(recipe, tmp_path / "own", trainer=counting).summary
    assert own["state_sha256"] == plain["state_sha256"]
    assert len(jobs) > 4


@pytest.mark.slow
def test_a_model_is_its_weights_however_it_is_given(
    small_recipe: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load() -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        return model, AutoTokenizer.from_pretrained(tiny_folder)

    pair = load()
    before = {name: weight.clone() for name, weight in pair[0].state_dict().items()}
    recipe = small_recipe(run={"rounds": 2, "samples": 0, "baselines": ["local"]})
    named = experiment.run(recipe, tmp_path / "named").summary["state_sha256"]
    for name, model in (("pair", pair), ("function", load)):
        given = experiment.run(recipe, tmp_path / name, model=model)
        assert given.summary["state_sha256"] == named
        assert given.baselines["local"].summary["rounds"] == 2
    after = pair[0].state_dict()
    assert before.keys() == after.keys(), "no adapter was put into the model of the caller"
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert pair[0].config.name_or_path == str(tiny_folder)


def test_a_federation_is_taken_as_it_is(
    small_recipe: Make, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    recipe: Recipe = small_recipe(run={"rounds": 1, "samples": 0})
    found = federate(recipe.data, tiny_tokenizer)
    named = experiment.run(recipe, tmp_path / "named").summary
    given = experiment.run(recipe, tmp_path / "given", data=found).summary
    assert given["state_sha256"] == named["state_sha256"]
    pooled = dataclasses.replace(
        recipe, run=dataclasses.replace(recipe.run, baselines=("centralised",))
    )
    with pytest.raises(ValueError, match=r"run\.baselines centralised needs rows"):
        experiment.run(pooled, tmp_path / "pooled", data=found)


def test_an_algorithm_that_can_be_imported_goes_on_from_the_command_line(
    small_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "from dataclasses import dataclass",
        "from fedloom.algorithms.fedavg import FedAvg",
        "@dataclass(frozen=True)",
        "class Mine(FedAvg):",
        '    """Say nothing new."""',
    ]
    (tmp_path / "my_lab.py").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("my_lab").Mine(mu=0.5)
    recipe = small_recipe(run={"rounds": 1, "samples": 0})
    experiment.run(recipe, tmp_path / "run", algorithm=mine)
    done = CliRunner().invoke(app, ["resume", str(tmp_path / "run"), "run.rounds=2"])
    assert done.exit_code == 0, done.exception
    longer = small_recipe(run={"rounds": 2, "samples": 0})
    whole = experiment.run(longer, tmp_path / "whole", algorithm=mine).summary
    assert open_run(tmp_path / "run").summary["state_sha256"] == whole["state_sha256"]
