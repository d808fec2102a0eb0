"""Rows come from files, folders, the Hub and the package, and every fault names its place."""

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings
from fedloom.data.readers import Row
from fedloom.data.sources import passed_over, take_rows

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def values(source: str, **given: Any) -> list[dict[str, object]]:
    return [dict(row.values) for row in take_rows(DataSettings(source=source, **given)).rows]


# --- what can be read ----------------------------------------------------------------------------


def test_json_holds_a_list_or_a_list_under_data(written: Callable[..., str]):
    assert values(written("a.json", ROWS)) == ROWS
    assert values(written("b.json", {"data": ROWS})) == ROWS


def test_json_lines_skip_empty_lines_and_keep_line_numbers(written: Callable[..., str]):
    path = written("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b\\u2028c"}\n')
    assert take_rows(DataSettings(source=path)).rows == [
        Row({"prompt": "a"}, path, 1, "line"),
        Row({"prompt": "b\u2028c"}, path, 3, "line"),
    ]


def test_a_line_separator_inside_a_json_line_is_text(written: Callable[..., str]):
    path = written("a.jsonl", '{"prompt": "a\u2028b"}\n{"prompt": "c"}')
    assert values(path) == [{"prompt": "a\u2028b"}, {"prompt": "c"}]


def test_csv_keeps_line_breaks_inside_quotes(written: Callable[..., str]):
    path = written("a.csv", '\ufeffprompt,completion\na,"b\nb"\n\nc\u2028,d\n')
    assert values(path) == [
        {"prompt": "a", "completion": "b\nb"},
        {"prompt": "c\u2028", "completion": "d"},
    ]


def test_parquet_is_read(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert values(str(tmp_path / "a.parquet")) == ROWS


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.gz"])
def test_compressed_files_are_read(name: str, tmp_path: Path):
    text = json.dumps(ROWS) if ".json." in name else "\n".join(map(json.dumps, ROWS))
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert values(str(tmp_path / name)) == ROWS


def test_a_folder_labels_every_row_with_the_stem_of_its_file(
    written: Callable[..., str], tmp_path: Path
):
    written("clients/xquad.de.json", ROWS[:1])
    written("clients/xquad.en.jsonl", ROWS[1:])
    written("clients/README.md", "not data")
    assert values(str(tmp_path / "clients")) == [
        {**ROWS[0], "file": "xquad.de"},
        {**ROWS[1], "file": "xquad.en"},
    ]


def test_hidden_files_are_no_clients_and_others_are_named(
    written: Callable[..., str], tmp_path: Path
):
    for name in ("a.jsonl", "._a.jsonl", ".DS_Store", "README.md", "b.xlsx", "old/c.jsonl"):
        written(f"clients/{name}", json.dumps(ROWS[0]) if name == "a.jsonl" else "\0")
    settings = DataSettings(source=str(tmp_path / "clients"))
    assert [dict(row.values) for row in take_rows(settings).rows] == [{**ROWS[0], "file": "a"}]
    assert passed_over(settings) == ["README.md", "b.xlsx", "old/"]
    assert passed_over(DataSettings()) == []


@pytest.mark.parametrize("twin", ["a.jsonl.gz", "a.csv", "a.JSONL"])
def test_two_files_that_would_be_one_client_are_refused(
    twin: str, written: Callable[..., str], tmp_path: Path
):
    written("clients/a.jsonl", ROWS)
    written(f"clients/{twin}", "")
    with pytest.raises(
        ValueError, match=r"holds a\..* and a\..*, which would be one client 'a': rename"
    ):
        take_rows(DataSettings(source=str(tmp_path / "clients")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "b.jsonl has no rows"),
        (
            '{"file": "mine"}',
            "b.jsonl, line 1: has a column 'file' of its own, whose place the name",
        ),
    ],
)
def test_a_client_of_a_folder_is_never_lost_or_renamed(
    content: str, message: str, written: Callable[..., str], tmp_path: Path
):
    written("clients/a.jsonl", ROWS)
    written("clients/b.jsonl", content)
    with pytest.raises(ValueError, match=re.escape(message)):
        take_rows(DataSettings(source=str(tmp_path / "clients")))


def test_squad_articles_open_into_questions(written: Callable[..., str]):
    question = {"id": "1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]}
    article = {"title": "T", "paragraphs": [{"context": "Ada wrote.", "qas": [question, question]}]}
    found = values(written("a.json", {"version": "1.1", "data": [article]}))
    assert found == [{"title": "T", "context": "Ada wrote.", **question}] * 2


def test_a_natural_instructions_task_opens_into_instances(written: Callable[..., str]):
    task = {
        "Definition": ["Negate."],
        "Categories": ["Negation"],
        "Input_language": ["English"],
        "Instances": [{"id": "1", "input": "yes", "output": ["no"]}],
    }
    assert values(written("task001_negate.json", task)) == [
        {
            "definition": "Negate.",
            "category": "Negation",
            "language": "English",
            "task": "task001_negate",
            "id": "1",
            "input": "yes",
            "output": ["no"],
        }
    ]


def test_the_built_in_corpus_takes_languages_and_tasks():
    found = values("builtin:polyglot", num_examples=20, where={"language": ["de", "en"]})
    assert len(found) == 20
    assert {row["language"] for row in found} == {"de", "en"}


# --- which rows ----------------------------------------------------------------------------------


def test_where_keeps_rows_by_value(written: Callable[..., str]):
    path = written("a.jsonl", [{"n": 1, "x": "a"}, {"n": 2, "x": "a"}, {"n": 2, "x": "b"}])
    assert values(path, where={"n": ["2"], "x": ["a", "c"]}) == [{"n": 2, "x": "a"}]


def test_num_examples_samples_the_whole_file_in_order(written: Callable[..., str]):
    path = written("a.jsonl", [{"n": n} for n in range(100)])
    taken = [int(str(row["n"])) for row in values(path, num_examples=30)]
    assert taken == sorted(taken)
    assert len(set(taken)) == 30
    assert max(taken) > 60, "not the head of a sorted file"
    assert taken == [row["n"] for row in values(path, num_examples=30)]
    assert taken != [row["n"] for row in values(path, num_examples=30, seed=1)]


# --- the Hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Let `datasets` itself read a local data set under a Hub id; return the calls."""
    import datasets

    (tmp_path / "hub").mkdir()
    lines = [json.dumps({**row, "kind": kind}) for row, kind in zip(ROWS, (0, 1), strict=True)]
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(lines))
    load, calls = datasets.load_dataset, []

    def local(path: str, name: str | None = None, *, split: str, revision: str | None) -> Any:
        calls.append((path, name, split, revision))
        if path != "org/data":
            raise FileNotFoundError(f"Dataset {path} doesn't exist\nand more")
        files = str(tmp_path / "hub" / "train.jsonl")
        found = load("json", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))
        return found.cast_column("kind", datasets.ClassLabel(names=["plain", "fancy"]))

    monkeypatch.setattr(datasets, "load_dataset", local)
    return calls


def test_a_hub_id_goes_through_datasets_with_class_names(hub: list[tuple[Any, ...]]):
    settings = DataSettings(source="org/data", config="main", revision="v1")
    assert [row.values["kind"] for row in take_rows(settings).rows] == ["plain", "fancy"]
    assert hub == [("org/data", "main", "train", "v1")]


def test_several_configurations_become_the_label_file(hub: list[tuple[Any, ...]]):
    rows = take_rows(DataSettings(source="org/data", config=["de", "en"])).rows
    assert [row.values["file"] for row in rows] == ["de", "de", "en", "en"]
    assert [call[1] for call in hub] == ["de", "en"]


def test_a_hub_id_that_cannot_be_reached_is_one_sentence(hub: list[tuple[Any, ...]]):
    message = (
        "data.source org/other is no file here, and the Hub did not give it (config None, split train): "
        "Dataset org/other doesn't exist"
    )
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        take_rows(DataSettings(source="org/other"))
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_network_is_one_sentence():
    with pytest.raises(
        ValueError, match=r"data\.source org/no-such-data is no file here, and the Hub did not"
    ) as caught:
        take_rows(DataSettings(source="org/no-such-data"))
    assert "\n" not in str(caught.value)


# --- what cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"a": 1},\n {"a": }]', "a.json, line 2: not JSON (Expecting value)"),
        (
            "a.json",
            '{"rows": []}',
            'a.json must hold a list of rows or {"data": [...]}, got {"rows": []}',
        ),
        ("a.json", "[[1, 2]]", "a.json, row 1: must be an object with columns, got [1, 2]"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.jsonl", '{"a": 1}\n{"a"\n', "a.jsonl, line 2: not JSON (Expecting ':' delimiter)"),
        (
            "a.jsonl",
            '{"a": 1}\n\n"text"\n',
            'a.jsonl, line 3: must be an object with columns, got "text"',
        ),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv, line 3: must have 2 cells, got 1"),
        ("a.parquet", "text", "a.parquet is not Parquet:"),
        ("a.jsonl.gz", "text", "a.jsonl.gz ends in .gz, but is not gzip: take .gz off its name"),
        (
            "a.txt",
            "text",
            "a.txt must end in one of .csv, .csv.gz, .json, .json.gz, .jsonl, .jsonl.gz, .ndjson, .ndjson.gz, .parquet",
        ),
        (
            "a.json",
            '[{"paragraphs": 3}]',
            "a.json, row 1: paragraphs must be a list of objects, got 3",
        ),
        (
            "a.json",
            '[{"paragraphs": [{"qas": [1]}]}]',
            "a.json, row 1: qas must be a list of objects, got [1]",
        ),
        (
            "a.json",
            '{"Instances": "x"}',
            'a.json, row 1: Instances must be a list of objects, got "x"',
        ),
    ],
)
def test_an_unreadable_file_names_itself_and_the_line(
    name: str, content: str, message: str, written: Callable[..., str]
):
    with pytest.raises(ValueError, match=re.escape(message)):
        take_rows(DataSettings(source=written(name, content)))


def test_a_long_cell_of_csv_is_read_whole_and_pythons_limit_stays(written: Callable[..., str]):
    limit = csv.field_size_limit()
    path = written("a.csv", "a,b\n1," + "x" * 140_000 + "\n")
    assert values(path) == [{"a": "1", "b": "x" * 140_000}]
    assert csv.field_size_limit() == limit


def test_text_that_is_not_utf8_is_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 1: not UTF-8 \(byte 0xff\); save the file as"
    ):
        take_rows(DataSettings(source=str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    "source", ["./nothing", "some/where/else", "missing.jsonl", "~/nothing-here.csv"]
)
def test_a_missing_file_is_one_sentence(source: str):
    with pytest.raises(ValueError, match=re.escape(f"data.source {source} does not exist")):
        take_rows(DataSettings(source=source))


def test_a_folder_without_data_says_what_it_looks_for(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no file that ends in \.csv, \.csv\.gz,"):
        take_rows(DataSettings(source=str(tmp_path)))


def test_where_must_name_a_column_and_keep_something(written: Callable[..., str]):
    path = written("a.jsonl", [{"language": "en"}])
    with pytest.raises(ValueError, match=r"data\.where names 'lang', but the columns are language"):
        take_rows(DataSettings(source=path, where={"lang": ["en"]}))
    with pytest.raises(ValueError, match=r"has no rows with language in \['de'\]"):
        take_rows(DataSettings(source=path, where={"language": ["de"]}))
    with pytest.raises(
        ValueError, match=r"data\.where of builtin:polyglot takes language and task, got topic"
    ):
        take_rows(DataSettings(where={"topic": ["x"]}))


def test_a_row_without_a_line_is_placed_by_its_file():
    row = Row({"a": None}, "a.json")
    assert (row.place, row.text("a"), row.text("b")) == ("a.json", "", "")


def test_the_built_in_corpus_names_its_languages():
    message = (
        "data.where.language of builtin:polyglot must be among en, de, es, pt, sv, da, got 'xx'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        take_rows(DataSettings(where={"language": ["de", "xx"]}))
