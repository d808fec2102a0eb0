"""Files of rows, whatever their kind; rows that hold many examples are opened."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One row, and where it was read."""

    values: Mapping[str, object]
    file: str
    line: int | None = None
    """From 1."""
    unit: str = "row"
    """What `line` counts: lines of JSON Lines and CSV, rows elsewhere."""
    held_out: bool = False
    """Whether `data.held_out` keeps it from training."""

    @property
    def place(self) -> str:
        """Say where the row is, for error messages."""
        return self.file if self.line is None else f"{self.file}, {self.unit} {self.line}"

    def text(self, column: str) -> str:
        """Return a cell as text; null and a missing column are empty."""
        value = self.values.get(column)
        return "" if value is None else str(value).strip()


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, one an example."""
    kind = kind_of(path)
    if not kind:
        raise ValueError(f"data.source {path} must end in one of {', '.join(sorted(READERS))}")
    try:
        yield from flattened(READERS[kind](path))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error


def kind_of(path: Path) -> str:
    """Return the ending a file is read by; empty where it is not read."""
    return next((kind for kind in READERS if path.name.lower().endswith(kind)), "")


def _text(path: Path) -> str:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.name.endswith(".gz") else raw).decode("utf-8-sig")


def _json(path: Path) -> Iterator[Row]:
    try:
        data = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    if isinstance(data, dict) and "Instances" in data:
        data = [data | {"task": path.name.removesuffix(".gz").removesuffix(".json")}]
    if not isinstance(data, list):
        raise ValueError(
            f'{path} must hold a list of rows or {{"data": [...]}}, got {_short(data)}'
        )
    for line, values in enumerate(data, start=1):
        if not isinstance(values, dict):
            raise ValueError(
                f"{path}, row {line}: must be an object with columns, got {_short(values)}"
            )
        yield Row(values, str(path), line)


def _jsonl(path: Path) -> Iterator[Row]:
    for line, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {line}: not JSON ({error.msg})") from error
        if not isinstance(values, dict):
            raise ValueError(
                f"{path}, line {line}: must be an object with columns, got {_short(values)}"
            )
        yield Row(values, str(path), line, "line")


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    try:
        names = next(reader, [])
        for cells in reader:
            if cells and len(cells) != len(names):
                raise ValueError(
                    f"{path}, line {reader.line_num}: must have {len(names)} cells, got {len(cells)}"
                )
            if cells:
                yield Row(dict(zip(names, cells, strict=True)), str(path), reader.line_num, "line")
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet  # slow to import

    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not Parquet: {error}") from error
    for line, values in enumerate(rows, start=1):
        yield Row(values, str(path), line)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _json,
    ".json.gz": _json,
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


# --- files that hold many examples in one row ---------------------------------------------------


def flattened(rows: Iterable[Row]) -> Iterator[Row]:
    """Open SQuAD articles and Natural Instructions tasks into one row an example."""
    for row in rows:
        if "paragraphs" in row.values:
            yield from _article(row)
        elif "Instances" in row.values:
            yield from _task(row)
        else:
            yield row


def _article(row: Row) -> Iterator[Row]:
    shared = {name: value for name, value in row.values.items() if name != "paragraphs"}
    for paragraph in _objects(row, row.values["paragraphs"], "paragraphs"):
        for question in _objects(row, paragraph.get("qas"), "qas"):
            yield replace(row, values={**shared, "context": paragraph.get("context"), **question})


def _task(row: Row) -> Iterator[Row]:
    shared: dict[str, object] = {"definition": _first(row.values.get("Definition"))}
    for name, column in (("Categories", "category"), ("Input_language", "language")):
        if name in row.values:
            shared[column] = _first(row.values[name])
    shared |= {name: row.values[name] for name in ("task", "file") if name in row.values}
    for instance in _objects(row, row.values["Instances"], "Instances"):
        yield replace(row, values={**shared, **instance})


def _objects(row: Row, value: object, name: str) -> Sequence[Mapping[str, object]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{row.place}: {name} must be a list of objects, got {_short(value)}")
    return value


def _first(value: object) -> object:
    return value[0] if isinstance(value, list) and value else value


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
