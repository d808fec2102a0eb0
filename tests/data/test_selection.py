"""Which rows of each file are taken, and which are held out."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings, Sample
from fedloom.data.sources import take_rows


@pytest.fixture
def folder(written: Callable[..., str], tmp_path: Path) -> str:
    """Return a folder of two files, 40 rows and 10, with texts of 0 to 39 and 0 to 9 characters."""
    for name, count in (("big", 40), ("small", 10)):
        written(f"{name}.jsonl", [{"x": "é" * n, "kind": f"k{n % 4}"} for n in range(count)])
    return str(tmp_path)


def taken(source: str, **given: Any) -> dict[str, list[int]]:
    """Return the length of `x` of every row taken, by file."""
    rows = take_rows(
        DataSettings(source=source, **given), lambda texts: [2 * len(t) for t in texts]
    ).rows
    out: dict[str, list[int]] = {}
    for row in rows:
        out.setdefault(str(row.values["file"]), []).append(len(str(row.values["x"])))
    return out


def test_shorter_counts_characters_or_tokens(folder: str):
    assert taken(folder, shorter={"x": 5}) == {"big": [0, 1, 2, 3, 4], "small": [0, 1, 2, 3, 4]}
    assert taken(folder, shorter={"x": 5}, shorter_in="tokens")["big"] == [0, 1, 2]


def test_a_sample_is_of_each_file_in_its_order(folder: str):
    found = taken(folder, sample=Sample(share=0.25))
    assert {name: len(lengths) for name, lengths in found.items()} == {"big": 10, "small": 2}
    assert found["big"] == sorted(found["big"])
    assert max(found["big"]) > 20, "not the head of the file"
    assert found == taken(folder, sample=Sample(share=0.25))
    assert found != taken(folder, sample=Sample(share=0.25), seed=1)


@pytest.mark.parametrize(
    ("sample", "big", "small"),
    [
        (Sample(skip_below=11), 40, 0),
        (Sample(skip_below=10), 40, 10),
        (Sample(share=0.5, at_least=8), 20, 8),
        (Sample(share=0.5, at_least=30), 30, 10),
        (Sample(share=0.1, skip_below=20), 4, 0),
    ],
)
def test_small_files_are_left_out_or_kept_whole(sample: Sample, big: int, small: int, folder: str):
    found = taken(folder, sample=sample)
    assert (len(found.get("big", [])), len(found.get("small", []))) == (big, small)


def test_files_are_counted_after_long_rows_are_gone(folder: str):
    found = taken(folder, shorter={"x": 21}, sample=Sample(share=0.25, skip_below=20))
    assert list(found) == ["big"]
    assert len(found["big"]) == 5


def test_what_is_held_out_has_a_sample_of_its_own(folder: str):
    settings = DataSettings(
        source=folder,
        held_out={"kind": ["k3"]},
        sample=Sample(share=0.1),
        held_out_sample=Sample(share=0.5, at_least=2),
    )
    rows = take_rows(settings).rows
    held = [row for row in rows if row.held_out]
    assert {str(row.values["kind"]) for row in held} == {"k3"}
    assert "k3" not in {str(row.values["kind"]) for row in rows if not row.held_out}
    assert len(held) == 5 + 2
    assert len(rows) == len(held) + 3 + 0


def test_the_built_in_corpus_can_hold_out_a_task():
    rows = take_rows(DataSettings(num_examples=60, held_out={"task": ["capital"]})).rows
    assert len(rows) == 60
    assert {row.held_out for row in rows if row.values["task"] == "capital"} == {True}
    assert {row.held_out for row in rows if row.values["task"] != "capital"} == {False}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shorter": {"y": 5}}, "data.shorter names 'y', but the columns are x, kind"),
        ({"held_out": {"y": ["a"]}}, "data.held_out names 'y', but the columns are x, kind"),
        ({"held_out": {"kind": ["k9"]}}, "data.held_out.kind has 'k9', which no row taken has"),
        (
            {"held_out": {"kind": ["k0", "k1", "k2", "k3"]}},
            "data.held_out leaves no row to learn from",
        ),
        (
            {"sample": Sample(skip_below=99)},
            "has no rows in files of 99 rows (data.sample.skip_below)",
        ),
        (
            {"shorter": {"x": 1}, "where": {"kind": ["k1"]}},
            "has no rows with kind in ['k1'], with x shorter than 1 characters",
        ),
    ],
)
def test_what_selects_nothing_is_refused(given: dict[str, Any], message: str, folder: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        take_rows(DataSettings(source=folder, **given))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Sample(share=0.0),
            "share of data.sample and held_out_sample must be in (0, 1], got 0.0",
        ),
        (
            lambda: Sample(skip_below=-1),
            "skip_below of data.sample and held_out_sample must be at least 0, got -1",
        ),
        (
            lambda: Sample(at_least=5),
            "at_least of data.sample and held_out_sample has no effect where share is 1, got 5",
        ),
        (
            lambda: DataSettings(held_out_sample=Sample(share=0.5)),
            "data.held_out_sample has no effect without data.held_out",
        ),
        (
            lambda: DataSettings(held_out={"task": []}),
            "data.held_out.task must be a list of values, got []",
        ),
        (
            lambda: DataSettings(shorter_in="tokens"),
            "data.shorter_in has no effect without data.shorter",
        ),
        (
            lambda: DataSettings(shorter={"input": 0}),
            "data.shorter.input must be at least 1, got 0",
        ),
        (
            lambda: DataSettings(shorter={"a": 1}, shorter_in="words"),  # type: ignore[arg-type]  # refused
            "data.shorter_in must be characters or tokens, got 'words'",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(make: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


ODD = [True, False, None, 1, 1.0, "no", " no", "None", "True", ["a"], float("nan")]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("no", ["no", " no"]),
        ("true", [True]),
        ("True", [True, "True"]),
        ("FALSE", [False]),
        (True, [True]),
        ("None", ["None"]),
        ("nan", []),
        ("1", [1]),
        ("1.0", [1.0]),
        (1, [1]),
        ('["a"]', [["a"]]),
    ],
)
@pytest.mark.parametrize("setting", ["where", "held_out"])
def test_values_are_compared_as_text(
    setting: str, value: Any, found: list[Any], written: Callable[..., str]
):
    path = written("a.jsonl", [{"x": x, "n": n} for n, x in enumerate(ODD)])
    given: dict[str, Any] = {setting: {"x": [value]}}
    settings = DataSettings(source=path, **given)
    if not found:
        with pytest.raises(ValueError, match=r"nan"):
            take_rows(settings)
        return
    rows = [row for row in take_rows(settings).rows if setting == "where" or row.held_out]
    assert [row.values["x"] for row in rows] == found


@pytest.mark.parametrize(
    "given", [{"where": {"x": ["a"]}}, {"held_out": {"x": ["a"]}}, {"shorter": {"x": 5}}]
)
def test_what_is_no_text_selects_nothing(given: dict[str, Any], written: Callable[..., str]):
    path = written("a.jsonl", '{"x": "a"}\n{"x": "\\ud800"}')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: x holds '\\ud800', half a character"):
        take_rows(DataSettings(source=path, **given))
