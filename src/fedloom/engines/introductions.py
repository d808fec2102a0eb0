"""What a site says of itself when it joins, read as a stranger's words: types, ranges and sizes first."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fedloom.core.protocols import ClientId, Profile
from fedloom.data.manifest import ClientCounts

_MOST_CLIENTS = 10_000
"""Of one site: each costs the server a profile, a name and a message a round."""
_MOST_LABELS = 32
_LONGEST = 100
"""Characters of a name, and of a label's value."""
_MOST = 2**53
"""Of any count."""
_OF_LABELS = ("labels", "num_values")
"""Counts that no site sends: how many of each label would tell more than a server needs."""
_COUNTS = tuple(field.name for field in fields(ClientCounts) if field.name not in _OF_LABELS)


def introduced(clients: object) -> dict[ClientId, tuple[Profile, ClientCounts]]:
    """Return profile and counts of every client of a site.

    Raises:
        ValueError: where anything is of another type, out of range or too long; nothing of it is kept then.
    """
    if not isinstance(clients, dict) or not 1 <= len(clients) <= _MOST_CLIENTS:
        raise ValueError(
            f"a site must introduce 1 to {_MOST_CLIENTS} clients, got {_shown(clients)}"
        )
    return {_name(client): _client(entry) for client, entry in clients.items()}


def plain(words: object, longest: int = 400) -> str:
    """Return what a stranger says as one short line that terminals and pages take as text."""
    text = "".join(c if c.isprintable() else " " for c in str(words)[: 2 * longest])
    return text[:longest].replace("[", "(").replace("]", ")").replace("<", "(").replace(">", ")")


def _client(entry: object) -> tuple[Profile, ClientCounts]:
    match entry:
        case {"profile": dict(profile), "counts": dict(counts), **others} if not others:
            return _profile(profile), _counts(counts)
    raise ValueError(f"a client must be introduced by profile and counts, got {_shown(entry)}")


def _profile(profile: Mapping[Any, Any]) -> Profile:
    if len(profile) > _MOST_LABELS:
        raise ValueError(f"a profile has at most {_MOST_LABELS} labels, got {len(profile)}")
    for name, value in profile.items():
        if type(name) is not str or type(value) is not str or not _fits(name) or not _fits(value):
            raise ValueError(
                f"a label must be a printable text of at most {_LONGEST} characters,"
                f" got {_shown({name: value})}"
            )
    return dict(profile)


def _counts(counts: Mapping[Any, Any]) -> ClientCounts:
    none = all(counts.get(name) == {} for name in _OF_LABELS)
    if counts.keys() != {*_COUNTS, *_OF_LABELS} or not none:
        raise ValueError(f"counts must be {', '.join(_COUNTS)} and no labels, got {_shown(counts)}")
    for name in _COUNTS:
        if type(counts[name]) is not int or not 0 <= counts[name] <= _MOST:
            raise ValueError(f"the count {name} must be in [0, 2^53], got {_shown(counts[name])}")
    return ClientCounts(**counts)


def _name(client: object) -> ClientId:
    if type(client) is str and _fits(client) and re.fullmatch(r"[\w.-]+", client):
        return client
    raise ValueError(
        f"a client's name must be of at most {_LONGEST} letters, digits, '.', '_' and '-',"
        f" got {_shown(client)}"
    )


def _fits(text: str) -> bool:
    return 0 < len(text) <= _LONGEST and text.isprintable()


def _shown(value: object) -> str:
    return plain(ascii(value) if not isinstance(value, dict) else list(value)[:3], 80)
