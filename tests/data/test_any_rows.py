"""Rows of any kind, through every kind of file: each cell is learnt, counted or refused with its place."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import Conversations, Record, to_records
from fedloom.data.sources import take_rows

COLUMNS = ("prompt", "completion", "language", "note")
READ = ("prompt", "completion", "language")
"""Columns that become text; `note` is used by nothing."""
ANY_TEXT = st.text(st.characters(), max_size=8)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NO_TEXT: st.SearchStrategy[Any] = st.sampled_from(["\ud800", "a\udfff", math.inf, [math.nan]])
"""Half characters, and numbers that JSON cannot write."""
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | NO_TEXT
VALUE = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"prompt": VALUE, "completion": VALUE}, optional={"language": VALUE, "note": VALUE}
    ),
    min_size=1,
    max_size=4,
)
QUICK = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_text(value: Any) -> bool:
    """Return whether a value can be written as UTF-8 text, JSON where it is no string."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        text.encode()
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except ValueError:
        return False
    return True


def says(text: str, value: Any) -> bool:
    """Return whether a text is what a cell holds: a string without spaces around it, or JSON that reads back."""
    if is_missing(value):
        return text == ""
    return text == value.strip() if isinstance(value, str) else json.loads(text) == value


def read(path: Path) -> Conversations | str:
    """Return what became of a file, or the sentence that refuses it."""
    asked = DataSettings(source=str(path), format="prompt-completion")
    try:
        return to_records(take_rows(asked).rows, asked)
    except ValueError as error:
        str(error).encode()  # every terminal can show it
        return str(error)


def check(path: Path, rows: Sequence[Mapping[str, Any]], place: str) -> None:
    """Hold what was read of a file against its rows."""
    found = read(path)
    wrong = [
        (number, column)
        for number, row in enumerate(rows, start=1)
        for column in READ
        if not (is_missing(row.get(column)) or is_text(row.get(column)))
    ]
    if isinstance(found, str):
        assert wrong or "name of a column" in found, found
        assert any(f"{path}, {place} {number}: {column} " in found for number, column in wrong)
        return
    losses = found.losses
    assert len(rows) == len(found.records) + losses.num_empty + losses.num_unlearnt
    columns = {column for row in rows for column in row}
    lost = Counter(c for row in rows for c in READ if c in columns and is_missing(row.get(c)))
    assert losses.missing == dict(lost)
    noted = sum(not is_missing(row.get("note")) for row in rows)
    assert losses.ignored == ({"note": noted} if noted else {})
    by_place = {record.place: record for record in found.records}
    for number, row in enumerate(rows, start=1):
        record = by_place.get(f"{path}, {place} {number}")
        if record is None:
            assert is_missing(row["completion"]) or not str(row["completion"]).strip()
        else:
            check_record(record, row)
    kept = {number for number in range(1, len(rows) + 1) if f"{path}, {place} {number}" in by_place}
    assert not [one for one in wrong if one[1] != "language" or one[0] in kept]


def check_record(record: Record, row: Mapping[str, Any]) -> None:
    asked, told = record.messages
    assert says(asked.content, row["prompt"])
    assert says(told.content, row["completion"])
    assert record.answer == told.content
    if "language" in record.labels:
        label = record.labels["language"]
        language = row.get("language")
        empty = is_missing(language) or not str(language).strip()
        assert label == "unknown" if empty else says(label, language)


@QUICK
@given(rows=ROWS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "lines.json"])
def test_any_json_is_learnt_counted_or_refused_with_row_and_column(
    name: str, rows: list[dict[str, Any]], tmp_path: Path
):
    path = tmp_path / name
    lines = name == "a.jsonl" or (name == "lines.json" and len(rows) > 1)
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    check(path, rows, "line" if lines else "row")


@QUICK
@given(rows=st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, TEXT)), min_size=1, max_size=4))
def test_any_csv_is_learnt_whole(rows: list[dict[str, str]], tmp_path: Path):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    path = tmp_path / "a.csv"
    path.write_bytes(out.getvalue().encode())
    found = read(path)
    assert isinstance(found, Conversations), found
    kept = [row for row in rows if row["completion"].strip()]
    assert found.losses.num_empty == len(rows) - len(kept)
    for record, row in zip(found.records, kept, strict=True):
        check_record(record, row)


CELLS: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "string": ("string", TEXT),
    "int64": ("int64", st.integers(-(2**63), 2**63 - 1)),
    "float64": ("float64", st.floats()),
    "bool": ("bool_", st.booleans()),
    "decimal": ("decimal", st.decimals(-9999, 9999, places=2)),
    "date": ("date32", st.dates(min_value=date(1000, 1, 1))),
    "time": (
        "timestamp",
        st.datetimes(min_value=datetime(1800, 1, 1), max_value=datetime(2200, 1, 1)),
    ),
    "list": ("list", st.lists(TEXT | st.none(), max_size=3)),
    "struct": ("struct", st.fixed_dictionaries({"a": st.integers(0, 9) | st.none(), "b": TEXT})),
    "binary": ("binary", st.binary(max_size=4)),
}


@QUICK
@given(data=st.data())
def test_any_parquet_is_learnt_counted_or_refused_with_row_and_column(
    data: st.DataObject, tmp_path: Path
):
    import pyarrow
    from pyarrow import parquet

    types = {
        "decimal": pyarrow.decimal128(10, 2),
        "timestamp": pyarrow.timestamp("us"),
        "list": pyarrow.list_(pyarrow.string()),
        "struct": pyarrow.struct({"a": pyarrow.int64(), "b": pyarrow.string()}),
        "date32": pyarrow.date32(),
    }
    count = data.draw(st.integers(1, 4))
    arrays, columns = {}, {}
    for column in COLUMNS:
        kind, cell = CELLS[data.draw(st.sampled_from(sorted(CELLS)))]
        columns[column] = data.draw(st.lists(cell | st.none(), min_size=count, max_size=count))
        made = types[kind] if kind in types else pyarrow.type_for_alias(kind.removesuffix("_"))
        arrays[column] = pyarrow.array(columns[column], type=made, from_pandas=False)
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(arrays), path)
    rows = [{c: _json(columns[c][at]) for c in COLUMNS} for at in range(count)]
    check(path, rows, "row")


def _json(value: Any) -> Any:
    """Return what stands for a value of Parquet in JSON; bytes as a number that nothing can write."""
    if isinstance(value, bytes):
        return math.inf
    if isinstance(value, Decimal):
        return str(value)
    return value.isoformat() if isinstance(value, date) else value
