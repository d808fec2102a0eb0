"""Names of many layers, as few as a sentence takes."""

from collections.abc import Collection, Sequence

_NAMED = 6
"""Groups of names that a sentence holds."""


def numberless(name: str) -> str:
    """Return a name with a star for each number: what layers and experts have in common."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def listed_groups(names: Collection[str]) -> str:
    """Return the names for a sentence, those that differ in numbers as one with their count."""
    groups: dict[str, int] = {}
    for name in sorted(names):
        groups[numberless(name)] = groups.get(numberless(name), 0) + 1
    return listed([f"{n} ({count})" if count > 1 else n for n, count in groups.items()])


def listed(groups: Sequence[str]) -> str:
    """Return the first few and how many more there are."""
    rest = len(groups) - _NAMED
    return ", ".join(groups[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
