"""Rows that are given as objects: a mapping says which client holds which, and may say which split they are of."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

from fedloom.core.protocols import ClientId
from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.federation import Federation, divide
from fedloom.data.preparation import SUPERVISED, Preparation
from fedloom.data.readers import Row, flattened, read_file
from fedloom.data.sources import Taken, with_column
from fedloom.data.splits import SPLITS

CLIENT = "client"
"""The label that clients are known by, as if it were a column of their rows."""
Rows = Iterable[Mapping[str, object]] | str | Path
"""Dicts, be they a list or a `datasets.Dataset`, or a file of rows."""
Given = Mapping[ClientId, Rows | Mapping[str, Rows]]
"""Client -> its rows, cut as `data.fractions` says; or client -> {"train", "validation", "test"} -> rows."""


def federate_given(
    data: Given, settings: DataSettings, tokenizer: Tokenizer, objective: Preparation = SUPERVISED
) -> Federation:
    """Tokenise rows that are given; `settings.partition` is natural, by `CLIENT`."""
    rows = [row for client in data for row in _held(client, data[client])]
    return divide(Taken(rows, {}), settings, tokenizer, objective)


def check_given(data: Mapping[object, object]) -> TypeGuard[Given]:
    """Refuse what is no mapping from clients to rows; no row is looked at.

    Raises:
        ValueError: with the first client that is none, or has none.
    """
    if not data:
        raise ValueError("data must map at least one client to rows, got an empty mapping")
    for client, rows in data.items():
        if not isinstance(client, str) or not client.strip():
            raise ValueError(f"data must be keyed by the names of clients, got {client!r}")
        if not isinstance(rows, Mapping):
            _check_rows(_place(client), rows)
            continue
        if not rows or not rows.keys() <= set(SPLITS):
            found = ", ".join(map(str, rows)) or "no key"
            raise ValueError(
                f"{_place(client)} must be rows, or rows by split (train, validation, test), got {found}"
            )
        for split, some in rows.items():
            _check_rows(f"{_place(client)}[{split!r}]", some)
    return True


def ready_splits(data: Given) -> bool:
    """Return whether every client's rows are cut already, so that no fractions count."""
    return all(isinstance(rows, Mapping) for rows in data.values())


def _check_rows(place: str, rows: object) -> None:
    if isinstance(rows, str | Path):
        if not Path(rows).expanduser().is_file():
            raise ValueError(f"{place} names a file of rows that does not exist: {rows}")
    elif isinstance(rows, bytes) or not isinstance(rows, Iterable):
        raise ValueError(f"{place} must be rows, each a dict, got {type(rows).__name__}")
    elif isinstance(rows, Iterator):
        raise ValueError(
            f"{place} can be read only once, got {type(rows).__name__}: make a list of it, as baselines and a run that"
            " is resumed read it again"
        )


def _held(client: ClientId, rows: Rows | Mapping[str, Rows]) -> Iterator[Row]:
    if not isinstance(rows, Mapping):
        found = _read(_place(client), rows, split="")
    else:
        found = [
            row
            for split in SPLITS
            for row in _read(f"{_place(client)}[{split!r}]", rows.get(split, ()), split=split)
        ]
    if not found:
        raise ValueError(f"{_place(client)} has no rows: leave the client out, or give it some")
    yield from with_column(found, CLIENT, client)


def _read(place: str, rows: Rows, *, split: str) -> list[Row]:
    if isinstance(rows, str | Path):
        found = read_file(Path(rows).expanduser())
    else:
        found = flattened(_numbered(place, rows))
    return [replace(row, split=split) for row in found]


def _numbered(place: str, rows: Iterable[object]) -> Iterator[Row]:
    for line, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}, row {line} must be a dict, got {type(row).__name__}")
        yield Row(row, place, line)


def _place(client: ClientId) -> str:
    return f"data[{client!r}]"
