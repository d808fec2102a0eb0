"""What a recipe says of its own partition and of the built-in corpus does not outlive them."""

from typing import Any

import pytest

from fedloom.recipe import apply_overrides, build_recipe, load_recipe, read_tree, shipped

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
