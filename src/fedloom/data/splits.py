"""Cut one client's examples into training, validation and test, all from the same distribution."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.core.randomness import derive
from fedloom.data.sharding import Labels, apportion

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Cut:
    """Indices of one client's examples."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """Return the indices of the three splits."""
        return self.train + self.validation + self.test


def ready(indices: Sequence[int], splits: Sequence[str]) -> Cut:
    """Return a client's examples as they come, each in the split it names."""
    return Cut(*(tuple(i for i in indices if splits[i] == split) for split in SPLITS))


def cut(
    indices: Sequence[int],
    labels: Sequence[Labels],
    *,
    by: str | None,
    fractions: tuple[float, float, float],
    seed: int,
) -> Cut:
    """Cut `indices` in the given shares, stratified by the label `by` and, below it, by all the others.

    A split with a positive share gets an example as soon as there is one to spare; training comes first.
    """
    sizes = _sizes(len(indices), fractions)

    def order(index: int) -> tuple[int, ...]:
        # Equal labels stand together; which label comes first, and which example of it, is hashed.
        main = labels[index][by] if by else ""
        rest = repr(sorted(labels[index].items()))
        return derive(seed, "by", main), derive(seed, "all", rest), derive(seed, "one", index)

    ordered = sorted(indices, key=order)
    turns = _turns(sizes)
    shift = derive(seed, "shift") % max(1, len(turns))
    parts: tuple[list[int], ...] = ([], [], [])
    for place, index in enumerate(ordered):
        parts[turns[(place + shift) % len(turns)]].append(index)
    return Cut(*(tuple(sorted(part)) for part in parts))


def _sizes(total: int, fractions: tuple[float, float, float]) -> list[int]:
    sizes = apportion(total, fractions)
    for split in (0, 1, 2):
        if fractions[split] > 0 and sizes[split] == 0:
            donor = max((0, 1, 2), key=lambda i: (sizes[i], -i))
            # The last training example is never given away.
            if sizes[donor] > 1 or (split == 0 and sizes[donor] == 1):
                sizes[donor] -= 1
                sizes[split] += 1
    return sizes


def _turns(sizes: Sequence[int]) -> list[int]:
    """Return which split each place goes to, so that every stretch of places has nearly the same shares."""
    total = sum(sizes)
    taken = [0, 0, 0]
    turns = []
    for place in range(1, total + 1):
        split = max((0, 1, 2), key=lambda i: (sizes[i] * place - taken[i] * total, -i))
        taken[split] += 1
        turns.append(split)
    return turns
