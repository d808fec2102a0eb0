"""The YAML of a recipe: every key once, no larger than a recipe, and errors with their line."""

import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedloom.data.mixtures import MultiDomain
from fedloom.data.partition import Natural
from fedloom.recipe import load_recipe
from fedloom.recipe_text import to_yaml
from fedloom.recipe_yaml import YamlError, brief, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run:\n  rounds: 1\n  rounds: 2\n", r"line 3: the key 'rounds' stands in line 2 already"),
        ("{a: 1, a: 1}", r"line 1: the key 'a' stands in line 1 already"),
        ("1: a\n0x1: b\n", r"line 2: the key 1 stands in line 1 already"),
        ("run:\n\trounds: 1\n", r"line 2: found character '\\t' that cannot start any token"),
        ("a: [", r"line 1: expected the node content"),
        ("a: *b", r"line 1: found undefined alias"),
        ("a: &a [*a]", r"line 1: an alias stands inside what it names"),
        ("a: &a {b: *a}", r"line 1: an alias stands inside what it names"),
        (BOMB, r"line \d: a recipe may hold 20000 values, with its aliases this has more"),
        ("[" * 60 + "]" * 60, r"line 1: values may be nested 50 deep, this one is deeper"),
        ("[" * 3_000, r"values may be nested 50 deep"),
        ("a: 1\nb: 2020-13-45", r"line 2: '2020-13-45' is no timestamp"),
        (f"a: {10**30}", r"line 1: '1000.*0' is larger than any number of a recipe"),
        (f"a: {'9' * 5000}", r"line 1: '999.*\.\.\. is no int"),
        ("a: 0x" + "f" * 20, r"larger than any number"),
        ("a: !!python/object:os.system x", r"line 1: could not determine a constructor"),
        ("[a]: 1", r"line 1: a key must be a word"),
        ("a\x00b", r"unacceptable character #x0000"),
        ("a: 1\n---\nb: 2", r"line 2: but found another document"),
        ("!!binary \xff", r"line 1"),
        ('a: 1\nb: "\\ud83d"', r"line 2: '\\ud83d' holds half a letter"),
    ],
)
def test_what_is_no_recipe_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(YamlError, match=message):
        read_yaml(text)


def test_anchors_and_merges_that_mean_something_are_read() -> None:
    text = "base: &b {x: 1, y: 2}\nother: {<<: *b, y: 3}\nagain: *b\n"
    assert read_yaml(text) == yaml.safe_load(text)
    assert read_yaml("") is None
    assert read_yaml("9223372036854775807") == 2**63 - 1


KEYS = st.text(string.ascii_letters, min_size=1, max_size=4)
TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
)


@given(TREES)
def test_what_yaml_writes_is_read_back(tree: object) -> None:
    assert read_yaml(yaml.safe_dump(tree)) == tree


@given(st.text(max_size=40) | st.text("[]{}&*:-!?'\"\n\t ab01.<|>%@`#,", max_size=40))
def test_any_text_is_read_or_refused_with_a_sentence(text: str) -> None:
    try:
        read_yaml(text)
        said = "taken"
    except YamlError as error:
        said = str(error)
    assert said
    assert "\n" not in said


def test_bytes_are_utf8_with_or_without_a_mark() -> None:
    assert read_yaml("\ufeffname: ä".encode()) == {"name": "ä"}
    with pytest.raises(YamlError, match="line 2: this is not UTF-8 text"):
        read_yaml("a: 1\nname: ä".encode("latin-1"))


def test_a_long_value_is_shown_in_part() -> None:
    assert brief("x") == "'x'"
    assert brief("x" * 999).endswith("x...")
    assert len(brief("x" * 999)) < 120


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
