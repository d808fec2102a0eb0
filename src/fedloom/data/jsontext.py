"""JSON read so that nothing of it is lost: a key given twice is an error, and every error is a sentence."""

import json
from collections.abc import Callable


class NotJson(ValueError):
    """Text that is not JSON; `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        """Keep the line."""
        super().__init__(message)
        self.line = line


class _Doubled(dict[str, object]):
    """An object with a key given twice, the second value winning."""

    key: str = ""


def loads(text: str) -> object:
    """Return the value of a JSON text.

    Raises:
        NotJson: where it is none.
        ValueError: a predicate, such as "has the key 'a' twice in one object".
    """
    value, fault = loads_each(text)
    if problem := fault(value):
        raise ValueError(problem)
    return value


def loads_each(text: str) -> tuple[object, Callable[[object], str]]:
    """Return the value of a JSON text, and what says of a part of it that a key is given twice there, or nothing.

    Raises:
        NotJson: where it is none.
        ValueError: a predicate, such as "is nested too deeply to be read".
    """
    doubled: list[_Doubled] = []

    def made(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        wrong = _Doubled(found)
        names = [name for name, _ in pairs]
        wrong.key = next(name for at, name in enumerate(names) if name in names[:at])
        doubled.append(wrong)
        return wrong

    def fault(part: object) -> str:
        wrong = _inside(part) if doubled else None
        return (
            f"has the key {wrong.key!r} twice in one object, so one would be lost" if wrong else ""
        )

    try:
        return json.loads(text, object_pairs_hook=made), fault
    except json.JSONDecodeError as error:
        raise NotJson(f"not JSON ({error.msg})", error.lineno) from error
    except RecursionError as error:
        raise ValueError("is nested too deeply to be read") from error
    except ValueError as error:  # Python's limit on the digits of a whole number
        raise ValueError("has a whole number of too many digits") from error


def json_of(value: object) -> object:
    """Return what a string of JSON holds, if that is an object or a list; other values as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return loads(value)
    except ValueError:
        return value


def _inside(value: object) -> _Doubled | None:
    if isinstance(value, _Doubled):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((wrong for part in parts if (wrong := _inside(part))), None)
