"""Values and columns of data stay as they were written, whatever YAML would make of them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedloom.data.mixtures import MultiDomain
from fedloom.data.partition import Natural
from fedloom.recipe import load_recipe, to_yaml
from fedloom.recipe_yaml import YamlError, read_yaml

ODD = [
    "no",
    "on",
    "Yes",
    "off",
    "null",
    "~",
    "1.0",
    "1e3",
    "0x10",
    "2024-01-01",
    "True",
    "007",
    "1_000",
]


@pytest.mark.parametrize("name", ["where", "held_out"])
def test_values_are_compared_as_written(name: str):
    listed = f"[{', '.join(ODD)}]"
    for tree in (
        read_yaml(f"data: {{{name}: {{language: {listed}}}}}")["data"][name]["language"],
        read_yaml(f"{{language: {listed}}}", ["data", name])["language"],
        read_yaml(listed, ["data", name, "language"]),
        read_yaml("\n".join(f"- {value}" for value in ODD), ["data", name, "language"]),
    ):
        assert tree == ODD


def test_classes_are_names_and_words():
    classes = {"true": "A", "no": "B", "1": "off"}
    text = "{true: A, no: B, 1: off}"
    whole = read_yaml(f"objective: {{classification: {{classes: {text}}}}}")
    assert whole == {"objective": {"classification": {"classes": classes}}}
    assert read_yaml(text, ["objective", "classification", "classes"]) == classes
    assert read_yaml("no", ["objective", "classification", "classes", "true"]) == "no"


def test_columns_and_labels_are_names():
    text = """
    columns: {prompt: on, completion: 1}
    labels: [no, 1]
    shorter: {on: 5}
    partition: {multi_domain: {by: no, order: [no, on], num_values: 2, share: 1.0}}
    """
    assert read_yaml(text, ["data"]) == {
        "columns": {"prompt": "on", "completion": "1"},
        "labels": ["no", "1"],
        "shorter": {"on": 5},
        "partition": {
            "multi_domain": {"by": "no", "order": ["no", "on"], "num_values": 2, "share": 1.0}
        },
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "data: {packing: no, num_clients: 7, system: null, partition: null, where: null, tiers: {a: 1.0}}",
        "local: {where: [no, 1.0]}",
        "data: {where: {a: ['no', \"on\", !!str 1]}}",
        "base: &b {x: [n]}\ndata: {where: {<<: *b, y: [m]}}",
    ],
)
def test_all_else_is_yaml_as_ever(text: str):
    assert read_yaml(text) == yaml.safe_load(text)


def test_what_is_no_yaml_is_an_error_of_yaml():
    with pytest.raises(YamlError):
        read_yaml("a: [")


def test_a_recipe_keeps_them_on_every_way_and_back(tmp_path: Path):
    given: dict[str, Any] = {
        "data.where": "{language: [no, de]}",
        "data.held_out.language": "[no]",
        "data.partition": "{natural: {by: no}}",
        "data.num_clients": "null",
    }
    recipe = load_recipe("quickstart", [f"{path}={value}" for path, value in given.items()])
    assert recipe.data.where == {"language": ["no", "de"]}
    assert recipe.data.held_out == {"language": ["no"]}
    assert recipe.data.partition == Natural("no")
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    order = load_recipe("quickstart", ["data.partition={multi_domain: {by: x, order: [no, yes]}}"])
    assert order.data.partition == MultiDomain("x", order=("no", "yes"))
