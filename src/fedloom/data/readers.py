"""Files of rows, whatever their kind; rows that hold many examples are opened."""

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeGuard

from fedloom.data.cells import short, to_text
from fedloom.data.jsontext import NotJson, loads, loads_each

_GZIP = b"\x1f\x8b"
# UTF-32's mark begins with UTF-16's, so it is asked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """Return the text of a file: gzip is known by its first bytes, UTF-16 and UTF-32 by their mark; else it is UTF-8.

    Raises:
        ValueError: with the file, and the line that is not in its encoding.
    """
    raw = path.read_bytes()
    if raw.startswith(_GZIP):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is gzip, but cut short or broken: {error}") from error
    elif raw and path.name.lower().endswith(".gz"):
        raise ValueError(f"{path} ends in .gz, but is not gzip: take .gz off its name")
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(encoding, "ignore")
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(
            f"{path}, line {before.count(chr(10)) + 1}: not {name} (byte 0x{error.object[error.start]:02x}); "
            "save the file as UTF-8"
        ) from error


def text_lines(path: Path) -> list[str]:
    """Return the lines of a file of text, as `read_text` has it, without white space around them and without empty ones."""
    lines = (line.strip() for line in read_text(path).split("\n"))
    return [line for line in lines if line]


_LONGEST = 2**31 - 1
"""Characters of a CSV cell; Python's own limit of 131,072 is for a whole process."""


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
    split: str = ""
    """The split it comes in: train, validation or test; empty where its client's rows are still to be cut."""

    @property
    def place(self) -> str:
        """Say where the row is, for error messages."""
        return self.file if self.line is None else f"{self.file}, {self.unit} {self.line}"

    def cell(self, column: str) -> str:
        """Return a cell as text, spaces and all; null, NaN and a missing column are empty."""
        try:
            return to_text(self.values.get(column))
        except ValueError as error:
            raise ValueError(f"{self.place}: {column} {error}") from error

    def text(self, column: str) -> str:
        """Return a cell as text without spaces around it."""
        return self.cell(column).strip()


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, one an example.

    Raises:
        ValueError: with the file and the line where it cannot be read, or where it has no rows.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"data.source {str(path)!a} has a name that is not UTF-8; rename it"
        ) from error
    kind = kind_of(path)
    if not kind:
        raise ValueError(f"data.source {path} must end in one of {', '.join(sorted(READERS))}")
    known: set[tuple[str, ...]] = set()
    for row in flattened(READERS[kind](path)):
        if (names := tuple(row.values)) not in known:
            known.add(names)
            _check_names(row)
        yield row
    if not known:
        raise ValueError(f"{path} has no rows")


def kind_of(path: Path) -> str:
    """Return the ending a file is read by; empty where it is not read."""
    return next((kind for kind in READERS if path.name.lower().endswith(kind)), "")


def _check_names(row: Row) -> None:
    for name in row.values:
        try:
            to_text(name)
        except ValueError as error:
            raise ValueError(f"{row.place}: the name of a column {error}") from error


# --- JSON and JSON Lines, whatever the file is called ---------------------------------------------


def _json(path: Path) -> Iterator[Row]:
    text = read_text(path)
    if not text.strip():
        return
    try:
        yield from _whole(text, path)
    except NotJson as error:
        if not _is_object(text.lstrip().split("\n", 1)[0]):
            raise ValueError(f"{path}, line {error.line}: {error}") from error
        yield from _lines(text, path)


def _jsonl(path: Path) -> Iterator[Row]:
    text = read_text(path)
    try:
        yield from (_whole if text.lstrip().startswith("[") else _lines)(text, path)
    except NotJson as error:
        raise ValueError(f"{path}, line {error.line}: {error}") from error


def _whole(text: str, path: Path) -> Iterator[Row]:
    try:
        data, fault = loads_each(text)
    except NotJson:
        raise
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    whole = data
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    if isinstance(data, dict) and "Instances" in data:
        data = [{"task": path.name[: -len(kind_of(path))]} | data]
    elif _is_by_client(data):
        data = _with_clients(data, path)
    if not isinstance(data, list):
        raise ValueError(f'{path} must hold a list of rows or {{"data": [...]}}, got {short(data)}')
    for line, values in enumerate(data, start=1):
        row = Row(values, str(path), line)
        if not isinstance(values, dict):
            raise ValueError(f"{row.place}: must be an object with columns, got {short(values)}")
        if problem := fault(values):
            raise ValueError(f"{row.place}: {problem}")
        yield row
    if problem := fault(whole):
        raise ValueError(f"{path} {problem}")


def _is_by_client(data: object) -> TypeGuard[dict[str, list[dict[str, object]]]]:
    """Return whether it maps the names of clients to their rows, as FedLLM-Bench's files do."""
    return (
        isinstance(data, dict)
        and all(isinstance(rows, list) and rows for rows in data.values())
        and all(isinstance(row, dict) for rows in data.values() for row in rows)
        and bool(data)
    )


def _with_clients(data: dict[str, list[dict[str, object]]], path: Path) -> list[dict[str, object]]:
    """Return the rows of all clients, each with its client's name."""
    for client, rows in data.items():
        if any(row.get("client", client) != client for row in rows):
            raise ValueError(
                f"{path}: rows of {client!r} have a column 'client' of their own, whose place that name would take; rename it"
            )
    return [{"client": client, **row} for client, rows in data.items() for row in rows]


def _lines(text: str, path: Path) -> Iterator[Row]:
    for line, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        try:
            values = loads(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(
                f"{path}, line {line}: must be an object with columns, got {short(values)}"
            )
        yield Row(values, str(path), line, "line")


def _is_object(text: str) -> bool:
    try:
        return isinstance(loads(text), dict)
    except ValueError:
        return False


# --- tables -------------------------------------------------------------------------------------


def _csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    records = _records(read_text(path), path, delimiter)
    if not records:
        return
    line, names = records[0]
    if len(names) == 1 and (other := next((c for c in ",;\t" if c in names[0]), "")):
        raise ValueError(
            f"{path}, line {line}: the header has no {delimiter!r}, but {other!r}; cells must be parted by {delimiter!r}"
        )
    for at, name in enumerate(names, start=1):
        if not name.strip():
            raise ValueError(
                f"{path}, line {line}: column {at} has no name; give it one or leave it out "
                "(pandas writes its index so without index=False)"
            )
        if name in names[: at - 1]:
            raise ValueError(f"{path}, line {line}: two columns are called {name!r}; rename one")
        if "\0" in name:
            raise ValueError(f"{path}, line {line}: not UTF-8 (NUL characters); save it as UTF-8")
    for line, cells in records[1:]:
        if len(cells) != len(names):
            raise ValueError(f"{path}, line {line}: must have {len(names)} cells, got {len(cells)}")
        yield Row(dict(zip(names, cells, strict=True)), str(path), line, "line")


def _records(text: str, path: Path, delimiter: str) -> list[tuple[int, list[str]]]:
    """Return the cells of each record that has any, and the line it begins in."""
    # Strict: an open quote would otherwise swallow the rest of the file into one cell.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[tuple[int, list[str]]] = []
    line = 1
    limit = csv.field_size_limit(_LONGEST)
    try:
        for cells in reader:
            if cells:
                records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)
    return records


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet  # slow to import

    try:
        with parquet.ParquetFile(path) as file:
            names, table = file.schema_arrow.names, file.read()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not Parquet: {' '.join(str(error).split())}") from error
    if twin := next((name for at, name in enumerate(names) if name in names[:at]), None):
        raise ValueError(f"{path}: two columns are called {twin!r}; rename one")
    try:
        rows = table.to_pylist(maps_as_pydicts="strict")
    except (ArrowException, ValueError, KeyError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} holds a value that cannot be read: {reason}") from error
    for line, values in enumerate(rows, start=1):
        yield Row(values, str(path), line)


_PLAIN: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
}
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    **_PLAIN,
    **{f"{kind}.gz": read for kind, read in _PLAIN.items()},
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
        raise ValueError(f"{row.place}: {name} must be a list of objects, got {short(value)}")
    return value


def _first(value: object) -> object:
    return value[0] if isinstance(value, list) and value else value
