"""Rows as objects: a mapping says who holds them, and may say of which split they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.federation import Federation, federate
from fedloom.data.given import CLIENT, federate_given
from fedloom.data.partition import Natural
from fedloom.data.tokens import Example

SETTINGS = DataSettings(source="python:x", partition=Natural(CLIENT), max_length=64)


def rows(name: str, count: int = 10) -> list[dict[str, str]]:
    return [{"prompt": f"{name} {i}", "completion": f"{i * 7 % 11}"} for i in range(count)]


def texts(federation: Federation, client: str) -> list[list[str]]:
    def prompts(examples: Any) -> list[str]:
        found: list[Example] = list(examples)
        return [e.record.messages[0].content for e in found if e.record is not None]

    shard = federation.shards[client]
    return [prompts(split) for split in (shard.train, shard.validation, shard.test)]


def test_a_client_holds_what_is_under_its_name(tiny_tokenizer: Tokenizer) -> None:
    found = federate_given({"b": rows("b"), "a": rows("a", 5)}, SETTINGS, tiny_tokenizer)
    assert list(found.shards) == ["a", "b"]
    assert sorted(prompt for split in texts(found, "a") for prompt in split) == [
        f"a {i}" for i in range(5)
    ]
    counts = found.manifest.clients["b"]
    assert (counts.train, counts.validation, counts.test) == (8, 1, 1)


def test_splits_that_are_ready_stay_as_they_are(tiny_tokenizer: Tokenizer) -> None:
    ready = {"train": rows("train", 2), "test": rows("test", 3)}
    found = federate_given({"a": ready, "b": rows("b")}, SETTINGS, tiny_tokenizer)
    assert texts(found, "a") == [
        ["train 0", "train 1"],
        [],
        ["test 0", "test 1", "test 2"],
    ]
    assert len(texts(found, "b")[0]) == 8


def test_files_and_data_sets_are_rows_too(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "b.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows("b")))
    plain = federate_given({"a": rows("a"), "b": rows("b")}, SETTINGS, tiny_tokenizer)
    given = {"a": datasets.Dataset.from_list(rows("a")), "b": file}
    assert federate_given(given, SETTINGS, tiny_tokenizer).manifest.sha256 == plain.manifest.sha256


def test_they_are_split_as_a_folder_of_files_is(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("a", "b"):
        text = "".join(json.dumps(row) + "\n" for row in rows(name))
        (tmp_path / f"{name}.jsonl").write_text(text)
    folder = DataSettings(source=str(tmp_path), partition=Natural("file"), max_length=64)
    read = federate(folder, tiny_tokenizer)
    given = federate_given({"a": rows("a"), "b": rows("b")}, SETTINGS, tiny_tokenizer)
    assert given.shards.keys() == read.shards.keys()
    for client in given.shards:
        assert sum(map(len, texts(given, client))) == sum(map(len, texts(read, client)))
