"""Who masks with whom, and how many must hold together: the same for all, from names and hashes that all know.

SecAgg+ (Bell, Bonawitz, Gascón, Lepoint, Raykova, CCS 2020): a sparse graph in the place of all pairs. Here it is a ring
in the order of hashes, in which everybody is joined to the nearest on either side: connected while no run of half of
`neighbours` is gone at two places.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence


def neighbours(
    names: Sequence[str], number: int | None, *, context: bytes
) -> Mapping[str, tuple[str, ...]]:
    """Return the neighbours of everybody, sorted.

    Args:
        names: Who takes part.
        number: Of neighbours; an odd one is rounded up; None, or as many as there are others: all.
        context: Decides who is next to whom.
    """
    if number is None or number + number % 2 >= len(names) - 1:
        return {name: tuple(sorted({*names} - {name})) for name in names}
    around = ring(names, context=context)
    reach = range(1, (number + 1) // 2 + 1)
    return {
        name: tuple(
            sorted({around[(at + step * side) % len(around)] for step in reach for side in (-1, 1)})
        )
        for at, name in enumerate(around)
    }


def ring(names: Sequence[str], *, context: bytes) -> list[str]:
    """Return the names in the order of their hashes."""
    return sorted(
        names, key=lambda name: hashlib.sha256(context + b"ring" + name.encode()).digest()
    )


def quorum(threshold: int, number: int) -> int:
    """Return the clients without which a sum of `number` is not opened: more than half, so that there is one such sum."""
    return max(threshold, number // 2 + 1)


def shares_needed(threshold: int, number: int, holders: int) -> int:
    """Return the shares that give a secret back: more than half of its holders', so that no two kinds can be had."""
    return max(holders // 2 + 1, -(-quorum(threshold, number) * holders // number))


def pieces(graph: Mapping[str, Collection[str]], left: Collection[str]) -> list[set[str]]:
    """Return what the graph falls apart into where only some are left: each has a sum of its own that can be told."""
    rest, found = set(left), list[set[str]]()
    while rest:
        reached, edge = set[str](), {min(rest)}
        while edge:
            reached |= edge
            edge = {other for name in edge for other in graph[name] if other in rest} - reached
        rest -= reached
        found.append(reached)
    return found
