"""Where rows come from: the built-in corpus, the Hub, files, a folder of files."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedloom.core.seeds import derive
from fedloom.data.partition import shuffled
from fedloom.data.settings import BUILTIN, DataSettings

DEFAULT_ROWS = 6000
"""Rows the built-in corpus writes where the recipe does not say."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row, and where it was read."""

    values: Mapping[str, object]
    file: str
    line: int | None = None
    """From 1."""
    unit: str = "row"
    """What `line` counts: lines of JSON Lines and CSV, rows elsewhere."""

    @property
    def place(self) -> str:
        """Say where the row is, for error messages."""
        return self.file if self.line is None else f"{self.file}, {self.unit} {self.line}"

    def text(self, column: str) -> str:
        """Return a cell as text; null and a missing column are empty."""
        value = self.values.get(column)
        return "" if value is None else str(value).strip()


def load_rows(settings: DataSettings) -> list[Row]:
    """Return the rows that `data.source` and `data.where` name, in the order of the source."""
    if settings.source == BUILTIN:
        return _builtin(settings)
    path = Path(settings.source).expanduser()
    if path.exists():
        rows = list(_flattened(_read_folder(path) if path.is_dir() else _read_file(path)))
    elif _looks_like_path(settings.source):
        raise ValueError(f"data.source {settings.source} does not exist")
    else:
        rows = _hub(settings)
    rows = [row for row in rows if _kept(row, settings.where)]
    if not rows:
        raise ValueError(f"data.source {settings.source} has no rows" + _under(settings.where))
    if settings.num_examples is None or settings.num_examples >= len(rows):
        return rows
    # A file sorted by language or author must not lose the last ones.
    order = shuffled(range(len(rows)), derive(settings.seed, "rows"))
    return [rows[i] for i in sorted(order[: settings.num_examples])]


# --- the built-in corpus and the Hub ------------------------------------------------------------


def _builtin(settings: DataSettings) -> list[Row]:
    from fedloom.data import polyglot  # only where it is asked for

    known = {"language": polyglot.LANGUAGES, "task": polyglot.TASKS}
    for column, values in settings.where.items():
        if column not in known:
            raise ValueError(f"data.where of {BUILTIN} takes language and task, got {column}")
        if wrong := [value for value in values if value not in known[column]]:
            raise ValueError(
                f"data.where.{column} of {BUILTIN} must be among {', '.join(known[column])}, got {wrong[0]!r}"
            )
    rows = polyglot.rows(
        settings.num_examples or DEFAULT_ROWS,
        derive(settings.seed, "polyglot"),
        settings.where.get("language", known["language"]),
        settings.where.get("task", known["task"]),
    )
    return [Row(row, BUILTIN, line) for line, row in enumerate(rows, start=1)]


def _hub(settings: DataSettings) -> list[Row]:
    if settings.config is None or isinstance(settings.config, str):
        return list(_flattened(_hub_config(settings, settings.config)))
    return [
        replace(row, values={**row.values, "file": config})
        for config in settings.config
        for row in _flattened(_hub_config(settings, config))
    ]


def _hub_config(settings: DataSettings, config: str | None) -> Iterator[Row]:
    import datasets  # slow to import

    try:
        found = datasets.load_dataset(
            settings.source, config, split=settings.split, revision=settings.revision
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"data.source {settings.source} is no file here, and the Hub did not give it (config {config}, "
            f"split {settings.split}): {reason}"
        ) from error
    names = {
        column: feature.names
        for column, feature in found.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return _named(found, settings.source, names)


def _named(
    found: Iterable[Mapping[str, object]], source: str, names: Mapping[str, Sequence[str]]
) -> Iterator[Row]:
    for line, values in enumerate(found, start=1):
        classes = {
            column: known[code]
            for column, known in names.items()
            if isinstance(code := values[column], int) and code >= 0
        }
        yield Row({**values, **classes}, source, line)


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or _kind(Path(source)) != ""


# --- files --------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> Iterator[Row]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and _kind(path))
    if not files:
        raise ValueError(
            f"data.source {folder} holds no file that ends in {', '.join(sorted(READERS))}"
        )
    for path in files:
        stem = path.name.removesuffix(".gz").removesuffix(_kind(path).removesuffix(".gz"))
        for row in _read_file(path):
            yield replace(row, values={**row.values, "file": stem})


def _read_file(path: Path) -> Iterator[Row]:
    kind = _kind(path)
    if not kind:
        raise ValueError(f"data.source {path} must end in one of {', '.join(sorted(READERS))}")
    try:
        yield from READERS[kind](path)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error


def _kind(path: Path) -> str:
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


def _flattened(rows: Iterable[Row]) -> Iterator[Row]:
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


# --- which rows ---------------------------------------------------------------------------------


def _kept(row: Row, where: Mapping[str, Sequence[str]]) -> bool:
    for column in where:
        if column not in row.values:
            raise ValueError(
                f"{row.place}: data.where names {column!r}, but the columns are {', '.join(row.values)}"
            )
    return all(str(row.values[column]) in map(str, values) for column, values in where.items())


def _under(where: Mapping[str, Sequence[str]]) -> str:
    said = ", ".join(f"{column} in {list(values)}" for column, values in where.items())
    return f" with {said}" if said else ""


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
