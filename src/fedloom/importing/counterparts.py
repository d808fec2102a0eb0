"""What keys of another framework are here: tables of them, and the recipe that a configuration becomes by one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, Any]
"""A configuration by dotted keys, with the framework's defaults of keys that the table knows one of."""
Settings = Mapping[str, Any]
"""Settings of a recipe by dotted paths."""
_ABSENT = object()


class NoCounterpart(Exception):
    """A value that nothing here stands for; the message says why."""


@dataclass(frozen=True, slots=True)
class Becomes:
    """What a value becomes."""

    settings: Settings = field(default_factory=dict)
    remark: str = ""
    """What differs for this value, beside what the table says of its key."""


Convert = Callable[[Any, Values], Becomes]


@dataclass(frozen=True, slots=True)
class Counterpart:
    """One key of another framework, and what it is here."""

    key: str
    """Dotted; `a.*` stands for all keys below `a`."""
    settings: str = ""
    """Settings of a recipe that it becomes, or a part of; empty: none."""
    remark: str = ""
    """What is different here; of a key without settings, why it has none."""
    convert: Convert | None = None
    """Its settings; None: it has none, or another key's conversion reads it."""
    default: Any = _ABSENT
    """What the framework takes where the key is left out, if a recipe has to say so."""

    @property
    def has_default(self) -> bool:
        """Return whether it counts where it is left out."""
        return self.default is not _ABSENT


def to(path: str, cast: Callable[[Any], Any] = lambda value: value) -> Convert:
    """Return a conversion that takes a value over as one setting."""
    return lambda value, _: Becomes({path: cast(value)})


def none(key: str, reason: str) -> Counterpart:
    """Return a key without counterpart."""
    return Counterpart(key, remark=reason)


def read_by(key: str, settings: str, *, where: Callable[[Values], bool], else_: str) -> Counterpart:
    """Return a key that another's conversion reads, where a condition holds; elsewhere it has no effect there either."""

    def convert(_: Any, values: Values) -> Becomes:
        if not where(values):
            raise NoCounterpart(else_)
        return Becomes()

    return Counterpart(key, settings, convert=convert)


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one key of a configuration."""

    key: str
    value: Any
    settings: str
    """What it became; empty: nothing."""
    remark: str
    given: bool
    """Whether the configuration says it, and not the framework's default."""


@dataclass(frozen=True, slots=True)
class Framework:
    """Another framework, and what its keys are here."""

    name: str
    table: Sequence[Counterpart]
    always: Settings = field(default_factory=dict)
    """Settings that follow from what it does whatever its configuration says."""
    notes: Sequence[str] = ()
    """What else it does, and what stands for it here: a sentence each."""

    def counterpart(self, key: str) -> Counterpart | None:
        """Return the row of the table for a key: its own, else that of the longest key above it."""
        rows = {row.key: row for row in self.table}
        parts = key.split(".")
        above = (".".join([*parts[:n], "*"]) for n in range(len(parts) - 1, 0, -1))
        return next((rows[name] for name in (key, *above) if name in rows), None)

    def translate(self, given: Values) -> tuple[dict[str, Any], list[Line]]:
        """Return the sections of a recipe, and what became of every key.

        Raises:
            ValueError: where two keys ask for different values of one setting, or one cannot be read.
        """
        defaults = {row.key: row.default for row in self.table if row.has_default}
        values = {**defaults, **given}
        tree: dict[str, Any] = {}
        for path, value in self.always.items():
            put(tree, path, value)
        keys = [*given, *(key for key in defaults if key not in given)]
        lines = [self._line(key, values, tree, given=key in given) for key in keys]
        return tree, [line for line in lines if line.given or line.settings]

    def _line(self, key: str, values: Values, tree: dict[str, Any], *, given: bool) -> Line:
        row, value = self.counterpart(key), values[key]
        if row is None:
            return Line(key, value, "", f"{self.name} has no such key that is known here", given)
        if row.convert is None:
            return Line(key, value, row.settings, row.remark, given)
        try:
            found = row.convert(value, values)
        except NoCounterpart as reason:
            return Line(key, value, "", str(reason), given)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{key} of {self.name} cannot be {value!r}: {error}") from error
        for path, setting in found.settings.items():
            put(tree, path, setting)
        remark = "; ".join(filter(None, (row.remark, found.remark)))
        written = ", ".join(found.settings) or row.settings
        return Line(key, value, written, remark, given)


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set a value at a dotted path of nested mappings, in place.

    Raises:
        ValueError: where another value is there.
    """
    *above, last = path.split(".")
    for key in above:
        tree = tree.setdefault(key, {})
    if last in tree and tree[last] != value:
        raise ValueError(f"it asks for {path} {value!r}, another key for {tree[last]!r}")
    tree[last] = value


# --- values as other frameworks write them --------------------------------------------------------

_TRUE, _FALSE = ("true", "1", "yes", "t", "y"), ("false", "0", "no", "f", "n", "none", "")


def truth(value: Any) -> bool:
    """Return a value as true or false, whatever it is written as.

    Raises:
        ValueError: where it is neither.
    """
    text = str(value).strip().lower()
    if text not in _TRUE + _FALSE:
        raise ValueError("it must be true or false")
    return text in _TRUE


def whole(value: Any) -> int:
    """Return a whole number, with k for thousands as some scripts have it."""
    text = str(value).strip().lower()
    return int(float(text[:-1]) * 1000) if text.endswith("k") else int(float(text))


def number(value: Any) -> float:
    """Return a number, a whole one as such."""
    return float(value)
