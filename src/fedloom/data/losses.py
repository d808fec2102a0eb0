"""What of the rows is in no conversation, counted."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from fedloom.data.cells import is_missing

_NAMED = 12
"""Names of one kind that a line has."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Rows in are records, `num_empty`, `num_unlearnt` and rows of `num_equal` together."""

    formats: Mapping[str, int] = field(default_factory=dict)
    """Format, with how it was chosen -> rows read so."""
    num_empty: int = 0
    """Rows without an answer."""
    num_unlearnt: int = 0
    """Rows all of whose answers are marked as not to be learnt."""
    num_turns: int = 0
    """Turns of records that are left out or not learnt: before the first question, after the last answer that is
    learnt, or an empty answer."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Column, or key of a turn as in `messages[].name` -> rows where it has a value that nothing is made of."""
    missing: Mapping[str, int] = field(default_factory=dict)
    """Column, likewise -> rows where it is asked for and is null, NaN or absent."""
    num_equal: int = 0
    """Pairs whose answers are equal, as they stand or once they are cut to length."""

    def more(self, *, num_empty: int, num_equal: int) -> "Losses":
        """Return the losses with those that tokens show."""
        return replace(
            self,
            num_empty=self.num_empty + num_empty,
            num_equal=self.num_equal + num_equal,
        )

    def read_as(self) -> str:
        """Say how rows were read, with counts where it was in several ways."""
        several = len(self.formats) > 1
        return ", ".join(
            f"{name}: {count:,} rows" if several else name for name, count in self.formats.items()
        )

    def lines(self) -> list[str]:
        """Return a line for each kind of loss."""
        counts = (
            (self.num_empty, "rows without an answer, left out"),
            (
                self.num_equal,
                "pairs left out: their answers are equal, or begin alike beyond data.max_length",
            ),
            (self.num_unlearnt, "rows left out: none of their answers is to be learnt"),
            (
                self.num_turns,
                "turns not learnt: before the first question, after the last answer, or empty",
            ),
        )
        columns = (("empty (null or NaN)", self.missing), ("not used", self.ignored))
        return [
            *(f"{count:,} {what}" for count, what in counts if count),
            *(f"{what}: {_few(names)}" for what, names in columns if names),
        ]


def _few(columns: Mapping[str, int]) -> str:
    named = [f"{name} ({count:,} rows)" for name, count in columns.items()]
    more = len(named) - _NAMED
    return ", ".join(named[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


@dataclass(slots=True)
class RowTally:
    """Counts row after row."""

    num_empty: int = 0
    num_unlearnt: int = 0
    num_turns: int = 0
    num_equal: int = 0
    formats: Counter[tuple[str, str]] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)

    def add_unanswered_(self, *, marked: bool) -> None:
        """Count a row without an answer that is learnt, `marked` where it has one that is not to be."""
        self.num_unlearnt += marked
        self.num_empty += not marked

    def add_pair_(self, rejected: str) -> None:
        """Count a pair that is left out: its rejected answer is empty, or equal to the chosen one."""
        self.num_empty += not rejected
        self.num_equal += bool(rejected)

    def add_columns_(
        self, values: Mapping[str, object], asked: Collection[str], used: Collection[str]
    ) -> None:
        """Count the columns `asked` for that a row lacks, and those it has beside them and those `used` otherwise."""
        self.missing.update(column for column in asked if is_missing(values.get(column)))
        self.ignored.update(
            column
            for column, value in values.items()
            if column not in asked and column not in used and not is_missing(value)
        )

    def losses(self) -> Losses:
        """Return the counts, columns in alphabetical order."""
        return Losses(
            {f"{name} ({why})": count for (name, why), count in self.formats.items()},
            self.num_empty,
            self.num_unlearnt,
            self.num_turns,
            dict(sorted(self.ignored.items())),
            dict(sorted(self.missing.items())),
            self.num_equal,
        )
