"""Files that are packed, encoded or named in other ways, and files that are broken, are read or named with their line."""

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.readers import Row, read_file

ROW = {"prompt": "ä", "completion": "b"}
LINE = json.dumps(ROW, ensure_ascii=False)
CSV = "prompt,completion\nä,b\n"


def read(folder: Path, name: str, content: bytes | str) -> list[Row]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_file(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.JSONL.GZ", gzip.compress(LINE.encode(), mtime=0)),
        ("x.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("x.Csv", CSV),
        ("x.tsv", CSV.replace(",", "\t")),
        ("x.ndjson", LINE),
        ("packed.json", gzip.compress(json.dumps([ROW]).encode(), mtime=0)),
        ("packed.csv", gzip.compress(CSV.encode(), mtime=0)),
        ("x.jsonl", "\ufeff" + LINE),
        ("x.jsonl.gz", gzip.compress(("\ufeff" + LINE).encode(), mtime=0)),
        ("x.csv", CSV.encode("utf-16")),
        ("x.csv", b"\xfe\xff" + CSV.encode("utf-16-be")),
        ("x.json", json.dumps([ROW]).encode("utf-16")),
        ("x.jsonl", LINE.encode("utf-32")),
        ("x.json", f"\n{LINE}\r\n\r\n{LINE}"),
        ("x.jsonl", json.dumps([ROW, ROW], indent=1)),
    ],
)
def test_rows_are_read_whatever_the_file_is_called_and_however_it_is_written(
    name: str, content: bytes | str, tmp_path: Path
):
    rows = read(tmp_path, name, content)
    assert {json.dumps(dict(row.values)) for row in rows} == {json.dumps(ROW)}


def test_json_lines_called_json_count_lines(tmp_path: Path):
    rows = read(tmp_path, "a.json", f"{LINE}\n\n{LINE}\n")
    assert [row.place for row in rows] == [
        f"{tmp_path}/a.json, line 1",
        f"{tmp_path}/a.json, line 3",
    ]


def test_a_record_of_csv_is_placed_where_it_begins(tmp_path: Path):
    rows = read(tmp_path, "a.csv", 'a,b\n1,"x\ny"\n\n2,z\n')
    assert [row.line for row in rows] == [2, 5]


PACKED = gzip.compress(json.dumps([ROW] * 50).encode(), mtime=0)
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json.gz", LINE, "a.json.gz ends in .gz, but is not gzip: take .gz off its name"),
        ("a.json.gz", PACKED[:-12], "a.json.gz is gzip, but cut short or broken: Compressed file"),
        ("a.json.gz", PACKED[:-8] + b"12345678", "a.json.gz is gzip, but cut short or broken: CRC"),
        ("a.json", PACKED[:12] + b"\xff" * 9, "a.json is gzip, but cut short or broken: "),
        ("a.json", "", "a.json has no rows"),
        ("a.jsonl", "\n \n", "a.jsonl has no rows"),
        ("a.csv", "a,b\n", "a.csv has no rows"),
        ("a.json.gz", "", "a.json.gz has no rows"),
        (
            "a.csv",
            "a\nx\n\xe4\n".encode("latin-1"),
            "a.csv, line 3: not UTF-8 (byte 0xe4); save the",
        ),
        (
            "a.csv",
            CSV.encode("utf-16")[:-1],
            "a.csv, line 2: not UTF-16 (byte 0x0a); save the file",
        ),
        ("a.csv", CSV.encode("utf-16-le"), "a.csv, line 2: not UTF-8 (byte 0xe4)"),
        ("a.csv", "a,b\nc,d\n".encode("utf-16-le"), "a.csv, line 1: not UTF-8 (NUL characters)"),
        ("a.json", LINE + "\n{bad", "a.json, line 2: not JSON (Expecting property name"),
        ("a.json", '[{"a": 1},\n{"a": 1]', "a.json, line 2: not JSON (Expecting ','"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}', "a.jsonl, line 2: has the key 'a' twice in one"),
        (
            "a.json",
            '[{"a": 1}, {"b": {"c": 1, "c": 2}}]',
            "a.json, row 2: has the key 'c' twice in",
        ),
        ("a.json", '{"v": 1, "data": [{"a": 1}], "v": 2}', "a.json has the key 'v' twice in one"),
        ("a.jsonl", '{"a": ' + DEEP, "a.jsonl, line 1: is nested too deeply to be read"),
        ("a.json", DEEP, "a.json is nested too deeply to be read"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", "a.jsonl, line 1: has a whole number of too many"),
        (
            "a.jsonl",
            '{"\\ud800": 1}',
            "a.jsonl, line 1: the name of a column holds '\\ud800', half",
        ),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv, line 1: two columns are called 'a'; rename one"),
        ("a.csv", ",a\n0,1\n", "a.csv, line 1: column 1 has no name; give it one or leave it out"),
        (
            "a.csv",
            "a;b\n1;2\n",
            "a.csv, line 1: the header has no ',', but ';'; cells must be parted",
        ),
        ("a.tsv", "a,b\n1,2\n", "a.tsv, line 1: the header has no '\\t', but ','; cells must be"),
        ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', "a.csv, line 3: not CSV (unexpected end of data)"),
        ("a.csv", '"a,b\n1,2\n', "a.csv, line 1: not CSV (unexpected end of data)"),
        ("a.csv", 'a,b\n"1\n",2\n3\n', "a.csv, line 4: must have 2 cells, got 1"),
        ("a.parquet", "", "a.parquet is not Parquet: Parquet file size is 0 bytes"),
    ],
)
def test_a_broken_file_is_one_sentence_with_its_line(
    name: str, content: bytes | str, message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{message}")) as caught:
        read(tmp_path, name, content)
    str(caught.value).encode()
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_text_is_one_sentence(tmp_path: Path):
    path = os.fsencode(tmp_path / "a") + b"\xff.jsonl"
    Path(os.fsdecode(path)).write_text(LINE)
    with pytest.raises(ValueError, match=r"a\\udcff.jsonl' has a name that is not UTF-8") as caught:
        list(read_file(Path(os.fsdecode(path))))
    str(caught.value).encode()


# --- Parquet ------------------------------------------------------------------------------------


def parquet(folder: Path, **columns: Any) -> list[Row]:
    import pyarrow
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.table(columns), folder / "a.parquet")
    return list(read_file(folder / "a.parquet"))


def test_maps_of_parquet_are_objects(tmp_path: Path):
    import pyarrow

    kind = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    (row,) = parquet(tmp_path, a=pyarrow.array([[("k", 1)]], type=kind))
    assert row.text("a") == '{"k": 1}'
    with pytest.raises(ValueError, match=r"a\.parquet holds a value that cannot be read: .*'k'"):
        parquet(tmp_path, a=pyarrow.array([[("k", 1), ("k", 2)]], type=kind))


def test_dates_beyond_any_calendar_are_one_sentence(tmp_path: Path):
    import pyarrow

    far = pyarrow.array([2**40], type=pyarrow.timestamp("s"))
    with pytest.raises(ValueError, match=r"a\.parquet holds a value that cannot be read: "):
        parquet(tmp_path, a=far)


def test_two_columns_of_parquet_with_one_name_are_refused(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet as writer

    table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["a", "a"])
    writer.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: two columns are called 'a'; rename one"):
        list(read_file(tmp_path / "a.parquet"))


def test_a_folder_called_like_a_partition_adds_no_column(tmp_path: Path):
    (tmp_path / "language=de").mkdir()
    assert [dict(row.values) for row in parquet(tmp_path / "language=de", a=["x"])] == [{"a": "x"}]
