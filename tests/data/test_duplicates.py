"""Equal rows are counted, and what of the held-out data is learnt; dropped where asked for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings
from fedloom.data.duplicates import Leak, conversation, first_of_each, leaks
from fedloom.data.federation import federate
from fedloom.data.formats import Message, Record
from fedloom.data.partition import Natural
from fedloom.data.splits import Cut


def test_leaks_are_counted_by_split_and_across_clients():
    cuts = {"a": Cut((0, 1), (2,), (3, 4)), "b": Cut((5, 6), (), (7,))}
    #        0    1    2    3    4    5    6    7
    said = ["x", "y", "x", "z", "y", "z", "x", "new"]
    shared, found = leaks(cuts, said)
    assert shared == 1, "x is learnt by both"
    assert found == {"validation": Leak(1, 1, 0), "test": Leak(3, 2, 1)}


def test_a_conversation_is_its_turns_whatever_its_labels():
    turns = (Message("user", "a"), Message("assistant", "b"))
    one, same = Record(turns, {"language": "de"}, "b"), Record(turns, {}, "b", place="x, row 2")
    assert conversation(one) == conversation(same)
    joined = (Message("user", "ab"), Message("assistant", ""))
    assert conversation(one) != conversation(Record(joined, {}, ""))
    assert first_of_each(["x", "y", "x", "z", "y"]) == [0, 1, 3]


def test_of_equal_rows_one_that_is_measured_stays():
    learnt = Record((Message("user", "a"), Message("assistant", "b")), {}, "b", split="train")
    records = [
        *(learnt, learnt, replace(learnt, split="test")),
        *(learnt, replace(learnt, split="validation"), replace(learnt, held_out=True)),
    ]
    assert first_of_each(["x", "x", "x", "y", "y", "y"], records) == [2, 5]
    assert first_of_each(["x", "x", "x", "y", "y", "y"], [learnt] * 6) == [0, 3]
    assert first_of_each(["x", "y", "x", "y", "y", "z"], records) == [2, 4, 5]


@pytest.fixture
def twice(written: Callable[..., str]) -> DataSettings:
    """Return 60 conversations of ward a, 20 of which ward b has too, among 30."""

    def row(i: int, ward: str) -> dict[str, str]:
        return {"prompt": f"Question {i}?", "completion": f"answer {i}", "ward": ward}

    rows = [row(i, "a") for i in range(60)] + [row(i, "b") for i in range(40, 70)]
    return DataSettings(
        source=written("rows.jsonl", rows), prompt="plain", partition=Natural("ward")
    )


def test_equal_rows_are_kept_counted_and_said(twice: DataSettings, byte_level: Any):
    manifest = federate(twice, byte_level).manifest
    told = manifest.duplicates
    assert (told.num_rows, told.dropped) == (20, False)
    assert 0 < told.num_shared <= 20
    assert sum(leak.num_learnt for leak in told.leaks.values()) > 0
    for leak in told.leaks.values():
        assert leak.num_elsewhere == leak.num_learnt, "no ward has a row twice"
    said = manifest.left_out()
    assert "20 rows repeat an earlier one, kept (data.duplicates drop leaves them out)" in said
    test = told.leaks["test"]
    assert (
        f"{test.num_learnt} of 9 test rows are also learnt, {test.num_learnt} of them by other clients only"
        in said
    )
    assert sum(client.train for client in manifest.clients.values()) == 72


def test_equal_rows_are_left_out_where_asked_for(twice: DataSettings, byte_level: Any):
    manifest = federate(replace(twice, duplicates="drop"), byte_level).manifest
    clients = manifest.clients
    assert {name: c.train + c.validation + c.test for name, c in clients.items()} == {
        "a": 60,
        "b": 10,
    }
    assert (manifest.num_rows, manifest.duplicates.num_rows, manifest.duplicates.dropped) == (
        90,
        20,
        True,
    )
    assert manifest.left_out() == ["20 rows repeat an earlier one, left out"]


def test_a_client_of_nothing_but_repeated_rows_is_not_dropped_in_silence(
    written: Callable[..., str], byte_level: Any
):
    rows = [
        {"prompt": f"{i}?", "completion": f"{i}", "ward": ward} for ward in "ab" for i in range(9)
    ]
    settings = DataSettings(
        source=written("rows.jsonl", rows),
        prompt="plain",
        partition=Natural("ward"),
        duplicates="drop",
    )
    federation = federate(settings, byte_level)
    assert list(federation.shards) == ["a"]
    assert federation.manifest.left_out() == [
        "1 clients left out: fewer training examples than data.min_examples (1): b (0)",
        "9 rows repeat an earlier one, left out",
    ]


def test_a_held_out_row_that_is_learnt_as_well_is_said(
    written: Callable[..., str], byte_level: Any
):
    rows = [{"prompt": f"{i % 20}?", "completion": "a", "task": f"t{i // 20}"} for i in range(40)]
    settings = DataSettings(
        source=written("rows.jsonl", rows),
        prompt="plain",
        num_clients=2,
        fractions=(1, 0, 0),
        held_out={"task": ["t1"]},
    )
    said = federate(settings, byte_level).manifest.left_out()
    assert "20 of 20 test rows are also learnt, 20 of them by other clients only" in said
    wrong: Any = "all"
    with pytest.raises(ValueError, match=r"data\.duplicates must be keep or drop, got 'all'"):
        DataSettings(duplicates=wrong)
