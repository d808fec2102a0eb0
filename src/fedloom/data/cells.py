"""What a cell says: the one place where a value of a file becomes text."""

import json
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from numbers import Integral, Real
from uuid import UUID

PRINTED = "are lists or objects as Python prints them; write them as JSON, with json.dumps"
"""What is wrong with texts for which `is_printed`."""


def is_missing(value: object) -> bool:
    """Return whether a cell holds nothing: null, NaN, or what pandas has for either."""
    if isinstance(value, Decimal):
        return value.is_nan()
    # pandas' NA and NaT are told by name, so that pandas need not be there; NaT calls itself a date.
    if value is None or type(value).__name__ in {"NAType", "NaTType"}:
        return True
    return isinstance(value, Real) and value != value


def to_text(value: object) -> str:
    """Return a cell as text: a string as it is, nothing as the empty string, all else as JSON writes it.

    Dates, times, decimals and UUIDs, which JSON does not have, are written as they are printed.

    Raises:
        ValueError: a predicate, such as "holds bytes, which are no text"; who knows the place puts it in front.
    """
    if is_missing(value):
        return ""
    if isinstance(value, str):
        text = value
    elif isinstance(value, Decimal | date | time | UUID):
        text = str(_plain(value))
    else:
        text = _written(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"holds {text[error.start]!r}, half a character (a lone surrogate), at character {error.start + 1}"
        ) from error
    return text


def is_printed(value: object) -> bool:
    """Return whether a text is a list of objects or of texts, or an object, as Python prints it."""
    return isinstance(value, str) and value.lstrip().startswith(("[{'", "{'", "['"))


def short(value: object) -> str:
    """Return the beginning of a value as JSON, for an error message; half a character is escaped."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        text = f"a {type(value).__name__}"
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."


def _written(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except TypeError as error:
        raise ValueError("holds an object with a key that is no text") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply to be written") from error
    except ValueError as error:
        if str(error).startswith("holds"):
            raise
        raise ValueError("holds a number that is not finite, which JSON cannot write") from error


def _plain(value: object) -> object:
    """Return what stands for a value that JSON does not know."""
    if isinstance(value, Decimal):
        if value.is_infinite():
            raise ValueError("holds a number that is not finite")
        return format(value, "f")
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, Integral):  # numpy's
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes | bytearray | memoryview):
        raise ValueError("holds bytes, which are no text")
    raise ValueError(f"holds a {type(value).__name__}, which is no text")
