"""What clients are called."""

import re
from collections.abc import Sequence

from fedloom.core.protocols import ClientId


def client_names(count: int) -> list[ClientId]:
    """Return client-000, client-001, ..., which sort as they count."""
    width = max(3, len(str(count - 1)))
    return [f"client-{i:0{width}d}" for i in range(count)]


def safe_names(values: Sequence[str]) -> dict[str, ClientId]:
    """Return a name for every value that any file system takes and no two share, even where case is ignored."""
    names: dict[str, ClientId] = {}
    taken: set[str] = set()
    for value in values:
        stem = re.sub(r"[^\w.-]+", "-", value).strip("-.")[:80] or "client"
        name, number = stem, 2
        while name.casefold() in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name.casefold())
        names[value] = name
    return names
