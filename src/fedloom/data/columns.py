"""Which columns of a row are which: renamed, kept as labels."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from fedloom.data.data_settings import DataSettings
from fedloom.data.partition import stratum
from fedloom.data.readers import Row

KNOWN_LABELS = (
    "language",
    "task",
    "category",
    "client",
    "user",
    "author",
    "domain",
    "topic",
    "file",
)


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return a row with its columns called as `data.columns` says.

    Raises:
        ValueError: where one is not there, or would take the place of another.
    """
    if not columns:
        return row
    for new, old in columns.items():
        if old not in row.values:
            raise ValueError(
                f"{row.place}: data.columns names {old!r}, but the columns are {', '.join(row.values)}"
            )
        if new in row.values and new not in columns.values():
            raise ValueError(
                f"{row.place}: data.columns calls {old!r} {new!r}, but there is a column {new!r}, which would be lost;"
                f" give that one another name too, such as data.columns={{{new}: {old}, old_{new}: {new}}}"
            )
    kept = {name: value for name, value in row.values.items() if name not in columns.values()}
    return replace(row, values=kept | {new: row.values[old] for new, old in columns.items()})


def label_columns(found: Collection[str], settings: DataSettings) -> tuple[str, ...]:
    """Return the columns that are kept as labels, of those there are.

    Raises:
        ValueError: where the recipe names one that is not there.
    """
    by = stratum(settings.partition)
    wanted = dict.fromkeys(settings.labels or (name for name in KNOWN_LABELS if name in found))
    for where, names in (("data.labels", wanted), ("data.partition.by", [by] if by else [])):
        for name in names:
            if name not in found:
                raise ValueError(f"{where} names {name!r}, but the columns are {', '.join(found)}")
    if by:
        wanted.setdefault(by)
    return tuple(wanted)
