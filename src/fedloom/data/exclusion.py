"""Clients that take no part, as too few training examples are left of what they brought."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fedloom.core.protocols import ClientId
from fedloom.data.splits import Cut

_NAMED = 12
"""Clients that a line names."""


@dataclass(frozen=True, slots=True)
class Excluded:
    """Who is left out under `data.min_examples`, neither to learn nor to be measured."""

    min_examples: int = 1
    clients: Mapping[ClientId, int] = field(default_factory=dict)
    """Client -> the training examples it is left with."""
    num_rows: int = 0
    """Usable rows that these clients hold, of all three splits."""
    judges: Sequence[ClientId] = ()
    """Clients of `data.held_out` that no example is left of."""

    def lines(self) -> list[str]:
        """Return a line for each kind of client that is left out."""
        lines = []
        if self.clients:
            named = listed([f"{client} ({count:,})" for client, count in self.clients.items()])
            rows = f", and {self.num_rows:,} rows with them" if self.num_rows else ""
            lines.append(
                f"{len(self.clients):,} clients left out{rows}: fewer training examples than data.min_examples "
                f"({self.min_examples:,}): {named}"
            )
        if self.judges:
            lines.append(
                f"{len(self.judges):,} clients of data.held_out left out, without an example: {listed(self.judges)}"
            )
        return lines


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def exclude(
    dealt: Mapping[ClientId, Cut],
    sizes: Sequence[int],
    min_examples: int,
    *,
    testers: Collection[ClientId],
) -> tuple[dict[ClientId, Cut], Excluded]:
    """Return the clients that take part, and who is left out.

    Args:
        dealt: Indices of every client's rows.
        sizes: How many examples each row makes.
        min_examples: Training examples that a client needs.
        testers: Clients that brought nothing to learn from, and need none.

    Raises:
        ValueError: where nobody is left to learn.
    """
    held = {client: sum(sizes[i] for i in parts.train) for client, parts in dealt.items()}
    few = {c: held[c] for c in sorted(dealt) if held[c] < min_examples and c not in testers}
    remaining = {client: parts for client, parts in dealt.items() if client not in few}
    if few and not remaining.keys() - set(testers):
        remedy = "lower it, or give more data" if min_examples > 1 else "give more data"
        raise ValueError(
            f"data.min_examples is {min_examples}, but no client is left with as many training examples: {remedy}, "
            f"got at most {max(few.values())}"
        )
    num_rows = sum(len(dealt[client].all) for client in few)
    return remaining, Excluded(min_examples, few, num_rows)
