"""Which rows of a file are taken, and which of them are held out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fedloom.core.randomness import derive
from fedloom.data.cells import to_text
from fedloom.data.data_settings import DataSettings, Sample
from fedloom.data.readers import Row
from fedloom.data.sharding import shuffled

CountTokens = Callable[[Sequence[str]], Sequence[int]]


def select(
    rows: Sequence[Row], settings: DataSettings, *, file: int, count_tokens: CountTokens | None
) -> list[Row]:
    """Return what `where`, `shorter` and the samples leave of a file's rows, in its order.

    Args:
        rows: Of one file.
        settings: The recipe's section `data`.
        file: The number of the file; it decides what is drawn.
        count_tokens: Lengths of texts; needed where `shorter_in` is tokens.
    """
    where, held_out = _texts(settings.where), _texts(settings.held_out)
    chosen = [row for row in rows if all(_matches(row, where, "where"))]
    for column, limit in settings.shorter.items():
        texts = [_cell(row, column) for row in chosen]
        if settings.shorter_in == "tokens":
            assert count_tokens is not None  # federate has a tokenizer
            lengths = count_tokens(texts)
        else:
            lengths = [len(text) for text in texts]
        chosen = [row for row, length in zip(chosen, lengths, strict=True) if length < limit]
    if not settings.held_out:
        return _drawn(chosen, settings.sample, derive(settings.seed, "sample", file))
    marked = [
        replace(row, held_out=True) if any(_matches(row, held_out, "held_out")) else row
        for row in chosen
    ]
    learnt = _drawn(
        [row for row in marked if not row.held_out],
        settings.sample,
        derive(settings.seed, "sample", file),
    )
    judged = _drawn(
        [row for row in marked if row.held_out],
        settings.held_out_sample,
        derive(settings.seed, "held out", file),
    )
    taken = set(map(id, learnt + judged))
    return [row for row in marked if id(row) in taken]


def check_held_out(rows: Sequence[Row], settings: DataSettings) -> None:
    """Refuse to hold out what is not there, or all there is."""
    for column, values in _texts(settings.held_out).items():
        found = {spelling for row in rows if row.held_out for spelling in _spelt(row, column)}
        for value in values:
            if value not in found:
                raise ValueError(f"data.held_out.{column} has {value!r}, which no row taken has")
    if settings.held_out and all(row.held_out for row in rows):
        raise ValueError("data.held_out leaves no row to learn from")


def _texts(wanted: Mapping[str, Sequence[object]]) -> dict[str, dict[str, None]]:
    """Return the values wanted as cells would say them."""
    return {
        column: dict.fromkeys(to_text(value).strip() for value in values)
        for column, values in wanted.items()
    }


def _spelt(row: Row, column: str) -> tuple[str, ...]:
    """Return what a cell says; true and false in Python's spelling too, for a recipe may have either."""
    text = row.text(column)
    return (
        (text, text.title(), text.upper()) if isinstance(row.values.get(column), bool) else (text,)
    )


def _matches(row: Row, wanted: Mapping[str, Mapping[str, None]], setting: str) -> list[bool]:
    for column in wanted:
        if column not in row.values:
            raise ValueError(
                f"{row.place}: data.{setting} names {column!r}, but the columns are {', '.join(row.values)}"
            )
    return [
        any(spelling in values for spelling in _spelt(row, column))
        for column, values in wanted.items()
    ]


def _cell(row: Row, column: str) -> str:
    if column not in row.values:
        raise ValueError(
            f"{row.place}: data.shorter names {column!r}, but the columns are {', '.join(row.values)}"
        )
    return row.cell(column)


def _drawn(rows: Sequence[Row], sample: Sample, seed: int) -> list[Row]:
    if len(rows) < sample.skip_below:
        return []
    count = max(sample.at_least, int(sample.share * len(rows)))
    if count >= len(rows):
        return list(rows)
    order = shuffled(range(len(rows)), seed)
    return [rows[i] for i in sorted(order[:count])]
