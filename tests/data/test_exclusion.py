"""Clients with too few training examples: who is left out, what is said of it, and what it changes for the others."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings
from fedloom.data.exclusion import Excluded, exclude
from fedloom.data.federation import federate
from fedloom.data.given import CLIENT, federate_given
from fedloom.data.manifest import Manifest
from fedloom.data.mixtures import Clusters
from fedloom.data.partition import Dirichlet, Natural, Quantity
from fedloom.data.splits import Cut

SIZES = {"a": 40, "b": 9, "c": 30, "d": 4, "e": 20}
"""Rows of each ward."""


def rows(sizes: dict[str, int] = SIZES) -> list[dict[str, str]]:
    return [
        {"prompt": f"{ward} {i}?", "completion": f"{i}", "ward": ward, "task": f"t{i % 3}"}
        for ward, count in sizes.items()
        for i in range(count)
    ]


@pytest.fixture
def base(written: Callable[..., str]) -> DataSettings:
    return DataSettings(source=written("a.jsonl", rows()), partition=Natural("ward"), max_length=64)


def contents(federation: Any) -> dict[str, list[list[str]]]:
    return {
        client: [
            [example.record.messages[0].content for example in split]
            for split in (shard.train, shard.validation, shard.test)
        ]
        for client, shard in federation.shards.items()
    }


# --- who is left out -----------------------------------------------------------------------------


def test_who_has_fewer_training_examples_is_left_out_by_name_and_number(
    base: DataSettings, byte_level: Any
):
    federation = federate(replace(base, min_examples=8), byte_level)
    assert list(federation.shards) == list(federation.profiles) == ["a", "c", "e"]
    manifest = federation.manifest
    assert manifest.excluded == Excluded(8, {"b": 7, "d": 2}, num_rows=13)
    assert manifest.left_out() == [
        "2 clients left out, and 13 rows with them: fewer training examples than data.min_examples (8): b (7), d (2)"
    ]
    held = sum(c.train + c.validation + c.test for c in manifest.clients.values())
    assert manifest.num_rows == held + manifest.excluded.num_rows
    assert manifest.num_unassigned == 0
    again = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again.left_out() == manifest.left_out()


def test_the_others_hold_what_they_hold_beside_it(base: DataSettings, byte_level: Any):
    tiers = replace(base, tiers={"phone": 0.4, "desk": 0.6})
    whole, some = (federate(replace(tiers, min_examples=n), byte_level) for n in (1, 8))
    assert contents(some) == {c: held for c, held in contents(whole).items() if c in some.shards}
    assert some.profiles == {c: p for c, p in whole.profiles.items() if c in some.shards}
    assert some.manifest.sha256 != whole.manifest.sha256, "another split of the data"


def test_examples_count_once_they_are_cut_to_length_and_split(
    written: Callable[..., str], byte_level: Any
):
    given = rows({"a": 20, "b": 20})
    for row in given[25:]:
        row["prompt"] *= 40
    base = DataSettings(
        source=written("a.jsonl", given), prompt="plain", partition=Natural("ward"), max_length=32
    )
    for fewest, clients in ((3, ["a", "b"]), (4, ["a"])):
        found = federate(replace(base, min_examples=fewest), byte_level)
        assert list(found.shards) == clients, "b has 5 rows that fit, and learns 3 of them"


def test_packed_rows_count_as_the_examples_in_them(base: DataSettings, byte_level: Any):
    found = federate(replace(base, packing=True, min_examples=16), byte_level)
    assert list(found.shards) == ["a", "c", "e"]
    assert found.manifest.clients["e"].rows < 16 == found.manifest.clients["e"].train


@pytest.mark.parametrize("fewest", [1, 5])
def test_a_client_without_an_answer_is_reported(
    written: Callable[..., str], byte_level: Any, fewest: int
):
    given = [row | {"completion": ""} if row["ward"] == "c" else row for row in rows()]
    base = DataSettings(source=written("a.jsonl", given), partition=Natural("ward"))
    manifest = federate(replace(base, min_examples=fewest), byte_level).manifest
    assert manifest.excluded.clients == ({"c": 0} if fewest == 1 else {"c": 0, "d": 2})
    assert "30 rows without an answer, left out" in manifest.left_out()


def test_the_largest_that_lost_everything_are_no_error(
    written: Callable[..., str], byte_level: Any
):
    given = [row | {"completion": ""} if row["ward"] == "c" else row for row in rows()]
    base = DataSettings(source=written("a.jsonl", given))
    for largest, left_out in ((4, {}), (5, {"c": 0})):
        found = federate(replace(base, partition=Natural("ward", largest)), byte_level)
        assert list(found.shards) == ["a", "b", "d", "e"]
        assert found.manifest.excluded.clients == left_out
    with pytest.raises(ValueError, match=r"largest is 6, but the label 'ward' has only"):
        federate(replace(base, partition=Natural("ward", 6)), byte_level)


@pytest.mark.parametrize(
    "partition",
    [
        Dirichlet("task", alpha=0.02, min_examples=0),
        Quantity(sigma=4.0, min_examples=0),
        Clusters("ward"),
    ],
)
def test_clients_that_a_partition_gives_next_to_nothing_are_left_out(
    written: Callable[..., str], byte_level: Any, partition: Any
):
    base = DataSettings(source=written("a.jsonl", rows({"a": 60, "b": 2})))
    found = federate(replace(base, partition=partition, num_clients=8), byte_level)
    left_out = found.manifest.excluded
    assert left_out.clients
    assert set(left_out.clients.values()) == {0}
    assert len(found.shards) + len(left_out.clients) == 8
    assert all(shard.train for shard in found.shards.values())
    assert sum(len(split) for held in contents(found).values() for split in held) == 62


def test_nobody_left_is_one_sentence(base: DataSettings, byte_level: Any):
    message = (
        "data.min_examples is 33, but no client is left with as many training examples: lower it, or give more data, "
        "got at most 32"
    )
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # compared as a whole
        federate(replace(base, min_examples=33), byte_level)
    assert str(caught.value) == message


def test_learners_who_all_lose_everything_are_one_sentence(
    written: Callable[..., str], byte_level: Any
):
    given = [row if row["task"] == "t0" else row | {"completion": ""} for row in rows()]
    base = DataSettings(source=written("a.jsonl", given), held_out={"task": ["t0"]})
    for partition in (Natural("ward"), Natural("ward", 2)):
        with pytest.raises(ValueError, match=r"training examples: give more data, got at most 0$"):
            federate(replace(base, partition=partition), byte_level)


# --- who is measured only, and who is pooled -----------------------------------------------------


def test_judges_need_no_training_examples(base: DataSettings, byte_level: Any):
    plain = replace(base, min_examples=8, held_out={"task": ["t0"]})
    found = federate(plain, byte_level)
    assert list(found.shards) == ["a", "c", "e", *(f"held-out-{ward}" for ward in "abcde")]
    assert len(found.shards["held-out-d"].test) == 2


def test_a_judge_that_loses_everything_is_reported(written: Callable[..., str], byte_level: Any):
    given = [
        row | {"completion": ""} if (row["ward"], row["task"]) == ("b", "t0") else row
        for row in rows()
    ]
    settings = DataSettings(
        source=written("a.jsonl", given), partition=Natural("ward"), held_out={"task": ["t0"]}
    )
    manifest = federate(settings, byte_level).manifest
    assert "held-out-b" not in manifest.clients
    assert (
        "1 clients of data.held_out left out, without an example: held-out-b" in manifest.left_out()
    )


def test_a_client_that_is_given_a_test_split_alone_stays(byte_level: Any):
    data: dict[str, Any] = {
        "a": rows({"a": 20}),
        "few": {"train": rows({"x": 2}), "test": rows({"y": 9})},
        "judge": {"test": rows({"z": 5})},
    }
    settings = DataSettings(source="python:x", partition=Natural(CLIENT), min_examples=4)
    found = federate_given(data, settings, byte_level)
    assert list(found.shards) == ["a", "judge"]
    assert found.manifest.excluded == Excluded(4, {"few": 2}, num_rows=11)
    with pytest.raises(ValueError, match=r"min_examples is 17, but no client is left"):
        federate_given(data, replace(settings, min_examples=17), byte_level)


def test_the_pool_is_of_those_who_take_part(base: DataSettings, byte_level: Any):
    few = replace(base, min_examples=8)
    pooled, apart = (federate(s, byte_level) for s in (replace(few, pooled=True), few))
    assert len(pooled.shards["pool"].train) == 32 + 24 + 16
    assert pooled.manifest.excluded == apart.manifest.excluded
    assert pooled.manifest.sha256 == apart.manifest.sha256


# --- in words ------------------------------------------------------------------------------------


def test_many_are_named_in_part_and_counted_whole():
    (line,) = Excluded(20, {f"c{i:02d}": i for i in range(15)}, num_rows=1200).lines()
    assert line.startswith("15 clients left out, and 1,200 rows with them: fewer training examples")
    assert line.endswith("c11 (11) and 3 more")
    assert Excluded().lines() == []


def test_nobody_is_left_out_twice_or_forgotten():
    dealt = {c: Cut(tuple(range(n)), (), ()) for c, n in {"z": 3, "a": 1, "m": 2}.items()}
    remaining, left_out = exclude(dealt, [2, 1, 1], 3, testers=())
    assert remaining.keys() == {"z", "m"}, "a row may make several examples"
    assert left_out == Excluded(3, {"a": 2}, num_rows=1)
