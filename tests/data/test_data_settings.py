"""Settings refuse what cannot be meant, in one sentence."""

import re
from typing import Any, get_args

import pytest

from fedloom.data.data_settings import DataSettings, Format, PromptName
from fedloom.data.formats import FORMATS
from fedloom.data.partition import Dirichlet, Natural, Quantity, Shards
from fedloom.data.prompts import PROMPTS
from fedloom.recipe import apply_overrides, build_recipe, load_recipe, read_tree, shipped


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"source": ""},
            "data.source must name a file, a folder, a Hub id or builtin:polyglot, got ''",
        ),
        (
            {"source": "builtin:poly"},
            "data.source must be builtin:polyglot or builtin:polyglot_pairs to be built in, got 'builtin:poly'",
        ),
        (
            {"format": "alpacca"},
            "data.format must be one of auto, prompt-completion, messages, alpaca",
        ),
        (
            {"prompt": "llama"},
            "data.prompt must be one of auto, chat, alpaca, vicuna, plain, or a mapping",
        ),
        ({"truncate": "left"}, "data.truncate must be answer or prompt, got 'left'"),
        ({"max_length": 3}, "data.max_length must be at least 8, got 3"),
        ({"num_clients": 0}, "data.num_clients must be at least 1, got 0"),
        ({"num_examples": 0}, "data.num_examples must be at least 1, got 0"),
        ({"min_examples": 0}, "data.min_examples must be at least 1, got 0"),
        (
            {"fractions": (0.8, 0.2)},
            "data.fractions must be three shares (train above 0, validation, test), got",
        ),
        ({"fractions": (0.0, 0.5, 0.5)}, "data.fractions must be three shares (train above 0"),
        (
            {"fractions": (0.8, 0.1, 0.2)},
            "data.fractions must sum to 1, got [0.8, 0.1, 0.2] with sum 1.1",
        ),
        (
            {"tiers": {"phone": 0.5, "desk": 0.4}},
            "data.tiers must be shares above 0 that sum to 1, got {'phone': 0.5, 'desk': 0.4}",
        ),
        ({"tiers": {"phone": 1.0, "desk": 0.0}}, "data.tiers must be shares above 0 that sum to 1"),
        ({"where": {"language": "en"}}, "data.where.language must be a list of values, got 'en'"),
        ({"where": {"language": []}}, "data.where.language must be a list of values, got []"),
    ],
)
def test_a_wrong_setting_names_its_path_and_what_is_allowed(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataSettings(**given)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (Dirichlet, {"by": "task", "alpha": 0.0}, "data.partition.alpha must be above 0, got 0.0"),
        (
            Dirichlet,
            {"by": "task", "alpha": float("nan")},
            "data.partition.alpha must be above 0, got nan",
        ),
        (
            Dirichlet,
            {"by": "task", "min_examples": -1},
            "data.partition.min_examples must be at least 0, got -1",
        ),
        (
            Shards,
            {"by": "task", "per_client": 0},
            "data.partition.per_client must be at least 1, got 0",
        ),
        (Quantity, {"alpha": -1.0}, "data.partition.alpha must be above 0, got -1.0"),
        (Quantity, {"sigma": -1.0}, "data.partition.sigma must be at least 0, got -1.0"),
        (Quantity, {"min_examples": -1}, "data.partition.min_examples must be at least 0, got -1"),
        (
            Quantity,
            {"alpha": 1.0, "sigma": 2.0},
            "data.partition takes alpha or sigma, got both (1.0 and 2.0)",
        ),
    ],
)
def test_a_wrong_partition_names_its_path_and_what_is_allowed(
    kind: Any, given: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**given)


def test_every_format_and_prompt_that_can_be_named_exists():
    assert set(get_args(Format)) == {"auto", *FORMATS}
    assert set(get_args(PromptName)) == {"auto", "chat", *PROMPTS}


def test_the_defaults_are_valid_and_frozen():
    settings = DataSettings()
    with pytest.raises(AttributeError):
        settings.seed = 1  # type: ignore[misc]  # the point
    assert DataSettings(partition=Natural("language")).num_clients is None


NATURAL = "data.partition={natural: {by: hospital}}"
FILE: dict[str, Any] = {
    "name": "mine",
    "data": {"num_clients": 8, "num_examples": 90, "where": {"language": ["de"]}},
}


@pytest.mark.parametrize("name", shipped())
def test_a_natural_partition_takes_no_number_from_any_recipe(name: str):
    data = load_recipe(name, ["data.source=mine.jsonl", NATURAL]).data
    assert data.num_clients is None
    written = (read_tree(name).get("data") or {}).get("source", "builtin:").startswith("builtin:")
    assert not (written and (data.where or data.num_examples)), "nothing of the file is left out"


def test_a_number_of_clients_beside_natural_is_refused_with_the_remedy():
    for overrides in ([NATURAL, "data.num_clients=4"], ["data.num_clients=4", NATURAL]):
        with pytest.raises(
            ValueError,
            match=r"data\.num_clients is 4, but a natural partition has a client for every value of 'hospital': "
            r"leave it out, .*data\.partition=\{natural: \{by: hospital, largest: 4\}\}",
        ):
            load_recipe("quickstart", overrides)
    tree = {**FILE, "data": {"num_clients": 4, "partition": {"natural": {"by": "hospital"}}}}
    with pytest.raises(ValueError, match=r"data\.num_clients is 4"):
        build_recipe(tree)
    remedy = "data.partition={natural: {by: hospital, largest: 4}}"
    assert load_recipe("quickstart", [remedy]).data.num_clients is None


def test_a_number_stays_with_every_other_partition():
    for partition in ("iid", "{shards: {by: task}}"):
        tree = apply_overrides(FILE, [f"data.partition={partition}"])
        assert build_recipe(tree).data.num_clients == 8
    assert apply_overrides(FILE, [])["data"] == FILE["data"]
    assert apply_overrides(FILE, ["data={num_clients: 3}"])["data"] == {"num_clients": 3}


def test_what_the_built_in_corpus_is_written_by_does_not_thin_out_another_source():
    assert apply_overrides(FILE, ["data.source=mine.jsonl"])["data"] == {
        "num_clients": 8,
        "source": "mine.jsonl",
    }
    asked = ["data.source=mine.jsonl", "data.num_examples=50", "data.where.language=[en]"]
    data = apply_overrides(FILE, asked)["data"]
    assert (data["num_examples"], data["where"]) == (50, {"language": ["en"]})
    assert load_recipe("dolly", ["data.source=dolly.jsonl"]).data.held_out, "the same text"
    assert load_recipe("gsm8k", ["data.source=mine.jsonl"]).data.num_examples == 2400
