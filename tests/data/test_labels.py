"""Few and short values are told; of others a count and a hash stand there."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings
from fedloom.data.federation import federate
from fedloom.data.labels import hidden_labels, shown_labels
from fedloom.data.manifest import Manifest
from fedloom.data.mixtures import Clusters
from fedloom.data.partition import Dirichlet, Iid, Natural

SENTENCE = "Patient number {} was admitted with a fever of 39 degrees"


def of(values: Sequence[str], *, named: bool = False, known: Sequence[str] = ()) -> bool:
    """Return whether a label of these values is hidden."""
    labels = [{"topic": value} for value in values]
    return bool(hidden_labels(labels, named="topic" if named else None, known=known))


@pytest.mark.parametrize(
    ("values", "hidden"),
    [
        (["de", "en"] * 9, False),
        (["only"], False),
        ([f"value-{i}" for i in range(64)] * 2, False),
        ([f"value-{i}" for i in range(65)] * 2, True),
        ([f"value-{i}" for i in range(10)], True),
        (["x" * 40] * 9, False),
        (["x" * 41] * 9, True),
        (["Cause Effect Classification"] * 9, False),
        (["she was seen at noon today"] * 9, True),
        (["de"] * 99 + [SENTENCE.format(1)], True),
        ([str(10000 + i) for i in range(300)], True),
    ],
)
def test_few_and_short_values_are_told(values: list[str], hidden: bool):
    assert of(values) == hidden


def test_clients_are_called_by_their_label_so_it_is_told_where_it_can_name_them():
    assert not of([f"task{i}_" + "x" * 60 for i in range(700)], named=True)
    assert of([SENTENCE.format(i) for i in range(3)] * 9, named=True)


def test_what_the_recipe_has_in_it_is_told():
    classes = [f"intent-{i}" for i in range(77)]
    assert of(classes * 2)
    assert not of(classes * 2, known=classes)


def test_equal_values_have_equal_hashes():
    one, same, other = (shown_labels({"topic": v, "language": "de"}, {"topic"}) for v in "aab")
    assert one == same != other
    assert one["language"] == "de"
    assert one["topic"].startswith("sha256:")


@pytest.fixture
def wards(written: Callable[..., str]) -> DataSettings:
    rows = [
        {
            "prompt": f"Question {i}?",
            "completion": f"answer {i}",
            "topic": SENTENCE.format(i // 20),
            "user": f"user-{i}",
            "language": "de" if i % 2 else "en",
        }
        for i in range(80)
    ]
    return DataSettings(source=written("wards.jsonl", rows), prompt="plain", num_clients=2)


@pytest.mark.parametrize(
    "partition",
    [Iid(), Natural("topic"), Natural("user"), Dirichlet("topic"), Clusters("topic")],
    ids=str,
)
def test_no_manifest_has_the_text_of_a_label(partition: Any, wards: DataSettings, byte_level: Any):
    natural = isinstance(partition, Natural)
    federation = federate(
        replace(wards, partition=partition, num_clients=None if natural else 2), byte_level
    )
    manifest = federation.manifest
    assert "admitted" not in str(manifest.to_json())
    assert "admitted" not in str(list(federation.shards))
    assert manifest.hidden["topic"].num_values == 4
    assert ("user" in manifest.hidden) == (partition != Natural("user"))
    assert all("language" in client.labels for client in manifest.clients.values())
    profiles = [manifest.shown_labels(profile) for profile in federation.profiles.values()]
    assert "admitted" not in str(profiles)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert any("values of topic are not shown: 4" in line for line in manifest.left_out())


def test_a_told_profile_keeps_who_is_alike(wards: DataSettings, byte_level: Any):
    federation = federate(replace(wards, partition=Clusters("topic"), num_clients=8), byte_level)
    whole = [profile["group"] for profile in federation.profiles.values()]
    shown = [
        federation.manifest.shown_labels(profile)["group"]
        for profile in federation.profiles.values()
    ]
    assert len(set(whole)) == len(set(shown)) == 4
    assert [whole.index(group) for group in whole] == [shown.index(group) for group in shown]


def test_the_number_of_examples_is_no_label_even_where_a_column_is_called_so(
    wards: DataSettings, byte_level: Any
):
    manifest = replace(
        federate(wards, byte_level).manifest,
        hidden=hidden_labels([{"num_examples": str(i)} for i in range(9)]),
    )
    assert manifest.shown_labels({"num_examples": "12"}) == {"num_examples": "12"}
