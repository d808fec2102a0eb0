"""Real text goes through: GSM8K, CodeAlpaca, and XQuAD by language."""

import re
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings
from fedloom.data.federation import federate
from fedloom.data.formats import to_records
from fedloom.data.partition import Natural
from fedloom.data.sources import take_rows
from fedloom.evaluation.text_metrics import extract

pytestmark = pytest.mark.realtext


def test_gsm8k_ends_in_its_numbers(real_text: Path, byte_level: Any):
    settings = DataSettings(
        source=str(real_text / "gsm8k" / "train.jsonl"), prompt="plain", max_length=512
    )
    records = to_records(take_rows(settings).rows, settings).records
    assert len(records) == 7473
    for record in records:
        number = record.answer.rpartition("####")[2].strip().replace(",", "")
        assert re.fullmatch(r"-?[\d.]+", number)
        assert extract(record.answer, "number") == extract(number, "number")
    federation = federate(
        DataSettings(source=settings.source, prompt="plain", max_length=512, num_examples=600),
        byte_level,
    )
    assert sum(client.train for client in federation.manifest.clients.values()) == pytest.approx(
        480, abs=10
    )
    example = federation.shards["client-000"].test[0]
    assert example.record is not None
    prompt = byte_level.decode(example.ids[: example.prompt_length].tolist())
    assert prompt == example.record.messages[0].content + "\n"


def test_codealpaca_never_says_none(real_text: Path, byte_level: Any):
    settings = DataSettings(
        source=str(real_text / "codealpaca" / "train.json"),
        prompt="alpaca",
        max_length=512,
        num_examples=600,
    )
    federation = federate(settings, byte_level)
    kept = [
        e
        for shard in federation.shards.values()
        for e in (*shard.train, *shard.validation, *shard.test)
    ]
    assert len(kept) + federation.manifest.num_dropped == 600
    inputs = 0
    for example in kept:
        assert example.record is not None
        text = byte_level.decode(example.ids.tolist())
        assert "### Input:\nNone" not in text
        assert ("### Input:" in text.split("### Response:")[0]) == bool(
            example.record.messages[0].context
        )
        inputs += bool(example.record.messages[0].context)
    assert 0 < inputs < len(kept)


def test_xquad_is_one_client_a_language_and_keeps_its_answers(real_text: Path, byte_level: Any):
    """On natural files: 8 languages, the same counts."""
    settings = DataSettings(
        source=str(real_text / "xquad"),
        prompt="plain",
        max_length=256,
        truncate="prompt",
        partition=Natural("file"),
        num_examples=400,
    )
    federation = federate(settings, byte_level)
    assert list(federation.shards) == [
        f"xquad.{code}" for code in ("ar", "de", "en", "es", "ro", "ru", "tr", "zh")
    ]
    manifest = federation.manifest
    assert (manifest.num_dropped, manifest.num_empty, manifest.num_unassigned) == (0, 0, 0)
    for name, shard in federation.shards.items():
        assert federation.profiles[name] == {"file": name}
        for example in shard.test:
            assert example.record is not None
            answer = example.ids[example.prompt_length :].tolist()
            assert byte_level.decode(answer) == example.record.answer + "</s>"


def test_xquad_rows_are_parallel(real_text: Path):
    settings = DataSettings(source=str(real_text / "xquad"))
    rows = take_rows(settings).rows
    ids: dict[object, set[object]] = {}
    for row in rows:
        ids.setdefault(row.values["file"], set()).add(row.values["id"])
    assert {name: len(found) for name, found in ids.items()} == dict.fromkeys(ids, 1190)
    assert len(set(map(frozenset, ids.values()))) == 1
