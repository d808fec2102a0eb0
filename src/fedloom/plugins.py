"""Objects of other packages, and what they must be."""

import dataclasses
from operator import attrgetter


def missing_members(kind: type, protocol: type) -> list[str]:
    """Return the public members of a protocol that a class does not have."""
    wanted = [name for name in vars(protocol) if not name.startswith("_")]
    return [name for name in wanted if name not in dir(kind)]


def is_frozen(kind: type) -> bool:
    """Return whether a class is a frozen dataclass."""
    return dataclasses.is_dataclass(kind) and bool(attrgetter("__dataclass_params__.frozen")(kind))
