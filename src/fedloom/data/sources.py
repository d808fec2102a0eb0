"""Where rows come from: the built-in corpus, data sets known by name, the Hub, files, a folder of files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedloom.core.randomness import derive
from fedloom.data.catalogue import ALL, CATALOGUE, shaped
from fedloom.data.data_settings import BUILTIN, BUILTIN_PAIRS, DataSettings, Sample
from fedloom.data.readers import READERS, Row, flattened, kind_of, read_file
from fedloom.data.selection import CountTokens, check_held_out, select
from fedloom.data.sharding import shuffled
from fedloom.plugins import plugged_function

GROUP = "fedloom.data_sources"
"""Of the entry points by which installed packages name functions that return rows."""
DEFAULT_ROWS = 6000
"""Rows the built-in corpus writes where the recipe does not say."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The rows that are gone on with, and how many are not."""

    rows: list[Row]
    left_out: Mapping[str, int]
    """Rows left out, by the settings that say so."""


def take_rows(
    settings: DataSettings,
    count_tokens: CountTokens | None = None,
    *,
    readable: Sequence[str] = (),
) -> Taken:
    """Return the rows that `data` asks for, in the order of the source, read file by file, and how many were left out.

    Args:
        settings: The recipe's section.
        count_tokens: Lengths of texts; needed where `data.shorter_in` is tokens.
        readable: The only columns that exist for all that follows, filters and samples too; empty: all.
    """
    rows: list[Row] = []
    num_read = 0
    for number, file in enumerate(_files(settings)):
        found = list(_opened(file, readable) if readable else file)
        num_read += len(found)
        rows += select(found, settings, file=number, count_tokens=count_tokens)
    if not rows:
        raise ValueError(f"data.source {settings.source} has no rows" + _under(settings))
    left_out = {_selecting(settings): num_read - len(rows)}
    if settings.num_examples is not None and settings.num_examples < len(rows):
        left_out["data.num_examples"] = len(rows) - settings.num_examples
        # A file sorted by language or author must not lose the last ones.
        order = shuffled(range(len(rows)), derive(settings.seed, "rows"))
        rows = [rows[i] for i in sorted(order[: settings.num_examples])]
    check_held_out(rows, settings)
    return Taken(rows, {name: count for name, count in left_out.items() if count})


def _selecting(settings: DataSettings) -> str:
    """Return the names of the settings that rows are selected by."""
    plain = Sample()
    given = {
        "where": bool(settings.where),
        "shorter": bool(settings.shorter),
        "sample": settings.sample != plain,
        "held_out_sample": settings.held_out_sample != plain,
    }
    return ", ".join(f"data.{name}" for name, there in given.items() if there)


def _files(settings: DataSettings) -> Iterator[Iterable[Row]]:
    """Yield the rows of one file after another, so that no more than one is held before it is thinned."""
    if settings.source in (BUILTIN, BUILTIN_PAIRS):
        yield _builtin(settings)
        return
    if settings.source in CATALOGUE:
        yield from _named_set(settings)
        return
    path = Path(settings.source).expanduser()
    if path.exists() and settings.split == ALL:
        raise ValueError(
            f"data.split all takes the own splits of a data set known by name, got data.source {settings.source}: leave it"
            " out, as every client's rows are cut by data.fractions"
        )
    if path.is_dir():
        lists = path / "splits" / "default"
        yield from _tasks(path, lists) if lists.is_dir() else _folder(path)
    elif path.exists():
        yield read_file(path)
    elif _looks_like_path(settings.source):
        raise ValueError(f"data.source {settings.source} does not exist")
    elif (function := plugged_function(settings.source, group=GROUP)) is not None:
        yield _returned(function(), settings.source)
    else:
        yield from _hub(settings)


def _named_set(settings: DataSettings) -> Iterator[Iterable[Row]]:
    """Yield the rows of a data set known by name, from `data.path` or the Hub, each with the split it comes in."""
    name, named = settings.source, CATALOGUE[settings.source]
    if settings.path is None:
        wanted = named.splits if settings.split == ALL else {"": settings.split}
        for split, of_hub in wanted.items():
            found = replace(
                settings,
                source=named.hub,
                config=settings.config or named.config,
                revision=settings.revision or named.revision,
                split=named.splits.get(of_hub, of_hub),
            )
            yield from (_of_split(shaped(rows, name), split) for rows in _hub(found, known_as=name))
        return
    path = Path(settings.path).expanduser()
    if not path.exists():
        raise ValueError(f"data.path {settings.path} does not exist")
    files = {file.name[: -len(kind_of(file))]: file for file in path.glob("*") if _is_read(file)}
    splits = named.local_splits(files)
    if settings.split == ALL and not splits:
        raise ValueError(
            f"data.split all takes a folder that holds train, validation or test files alone, got data.path {settings.path}"
        )
    if not splits:
        of_path = replace(settings, source=as_path(settings.path), path=None)
        yield from (shaped(rows, name) for rows in _files(of_path))
        return
    if settings.split not in (ALL, *splits):
        raise ValueError(
            f"data.path {settings.path} holds {', '.join(splits)}, but no {settings.split}"
        )
    for split in splits if settings.split == ALL else [settings.split]:
        rows = shaped(read_file(files[splits[split]]), name)
        yield _of_split(rows, split if settings.split == ALL else "")


def as_path(name: str) -> str:
    """Return a path as a `data.source` that is one, though it is called as a data set known by name is."""
    return f"./{name}" if name in CATALOGUE else name


def _of_split(rows: Iterable[Row], split: str) -> Iterator[Row]:
    return (replace(row, split=split) for row in rows)


def _opened(rows: Iterable[Row], readable: Sequence[str]) -> Iterator[Row]:
    for row in rows:
        yield replace(row, values={k: v for k, v in row.values.items() if k in readable})


def _under(settings: DataSettings) -> str:
    conditions = [f"with {column} in {list(values)}" for column, values in settings.where.items()]
    conditions += [
        f"with {column} shorter than {limit} {settings.shorter_in}"
        for column, limit in settings.shorter.items()
    ]
    if settings.sample.skip_below:
        conditions.append(f"in files of {settings.sample.skip_below} rows (data.sample.skip_below)")
    return "".join(f" {each}" for each in [", ".join(conditions)] if each)


# --- folders ------------------------------------------------------------------------------------


def passed_over(settings: DataSettings) -> list[str]:
    """Return what is in the folder that `data.source` names and is not read; hidden files are not told."""
    folder = Path(settings.source).expanduser()
    if not folder.is_dir() or (folder / "splits" / "default").is_dir():
        return []
    return sorted(
        path.name.encode(errors="backslashreplace").decode() + "/" * path.is_dir()
        for path in folder.iterdir()
        if not path.name.startswith(".") and not _is_read(path)
    )


def _is_read(path: Path) -> bool:
    # What begins with a point is a system's own, such as the twins a Mac leaves (._a.jsonl).
    return path.is_file() and kind_of(path) != "" and not path.name.startswith(".")


def _folder(folder: Path) -> Iterator[Iterable[Row]]:
    files = sorted(path for path in folder.iterdir() if _is_read(path))
    if not files:
        raise ValueError(
            f"data.source {folder} holds no file that ends in {', '.join(sorted(READERS))}"
        )
    stems: dict[str, Path] = {}
    for path in files:
        stem = path.name[: -len(kind_of(path))]
        if stem in stems:
            raise ValueError(
                f"data.source {folder} holds {stems[stem].name} and {path.name}, which would be one client "
                f"{stem!r}: rename one, or take it out"
            )
        stems[stem] = path
    for stem, path in stems.items():
        yield with_column(read_file(path), "file", stem)


def _tasks(folder: Path, lists: Path) -> Iterator[Iterable[Row]]:
    """Yield the tasks of a checkout of Natural Instructions, each row with its task and its split."""
    for split in ("train", "test"):
        names = lists / f"{split}_tasks.txt"
        if not names.is_file():
            raise ValueError(f"data.source {folder} holds task files, but no {names}")
        for name in names.read_text(encoding="utf-8").split():
            found = [folder / "tasks" / f"{name}{kind}" for kind in (".json", ".json.gz")]
            path = next((path for path in found if path.is_file()), None)
            if path is None:
                raise ValueError(f"{names} names {name}, but there is no {found[0]}")
            yield with_column(read_file(path), "split", split)


def with_column(rows: Iterable[Row], column: str, value: str) -> Iterator[Row]:
    """Yield rows with one more column; one that is called so already must say the same."""
    for row in rows:
        if row.values.get(column, value) != value:
            raise ValueError(
                f"{row.place}: has a column {column!r} of its own, whose place the name of the {column} would take; "
                "rename it"
            )
        yield replace(row, values={**row.values, column: value})


# --- the built-in corpus and the Hub ------------------------------------------------------------


def _builtin(settings: DataSettings) -> list[Row]:
    from fedloom.data import polyglot  # only where it is asked for

    known = {"language": polyglot.LANGUAGES, "task": polyglot.TASKS}
    for column, values in settings.where.items():
        if column not in known:
            raise ValueError(
                f"data.where of {settings.source} takes language and task, got {column}"
            )
        if wrong := [value for value in values if value not in known[column]]:
            raise ValueError(
                f"data.where.{column} of {settings.source} must be among {', '.join(known[column])}, got {wrong[0]!r}"
            )
    write = polyglot.pairs if settings.source == BUILTIN_PAIRS else polyglot.rows
    rows = write(
        settings.num_examples or DEFAULT_ROWS,
        derive(settings.seed, "polyglot"),
        settings.where.get("language", known["language"]),
        settings.where.get("task", known["task"]),
    )
    return [Row(row, settings.source, line) for line, row in enumerate(rows, start=1)]


def _returned(rows: object, source: str) -> Iterator[Row]:
    """Yield the rows that another package's function returned."""
    if not isinstance(rows, Iterable):
        raise ValueError(f"data.source {source} must return rows, got {type(rows).__name__}")
    for line, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
            raise ValueError(
                f"data.source {source} must return rows that are mappings of columns by name, got"
                f" {type(row).__name__} as row {line}"
            )
        yield Row(dict(row), source, line)


def _hub(settings: DataSettings, known_as: str = "") -> Iterator[Iterable[Row]]:
    if settings.config is None or isinstance(settings.config, str):
        yield flattened(_hub_config(settings, settings.config, known_as))
        return
    for config in settings.config:
        yield with_column(flattened(_hub_config(settings, config, known_as)), "file", config)


def _hub_config(settings: DataSettings, config: str | None, known_as: str) -> Iterator[Row]:
    import datasets  # slow to import

    try:
        found = datasets.load_dataset(
            settings.source, config, split=settings.split, revision=settings.revision
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if known_as:
            raise ValueError(
                f"data.source {known_as} is {settings.source} on the Hub, which did not give it (config {config}, split"
                f" {settings.split}): {reason}; set data.path to a file or folder that has it"
            ) from error
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
    return (
        source.startswith((".", "/", "~")) or source.count("/") > 1 or kind_of(Path(source)) != ""
    )
