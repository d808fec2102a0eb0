"""Which of the exported models is whose, in one file that a program in front of them reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.core.description import GLOBAL
from fedloom.core.files import write_atomic
from fedloom.core.protocols import ClientId
from fedloom.rounds.reading import read_json

ROUTING = "routing.json"
"""Beside the exported models."""


def write_routing(
    folder: Path,
    written: Mapping[str, Path],
    users: Mapping[str, Sequence[ClientId]],
    *,
    quiet: bool,
) -> None:
    """Write who uses which model, how many do, and which one is for clients that never took part.

    Args:
        folder: Where the models were written.
        written: What to load, by the model's name.
        users: Whose each is, by name.
        quiet: Whether nothing may be told of single clients, nor of how many there are.
    """
    total = sum(map(len, users.values()))
    models: dict[str, dict[str, Any]] = {
        name: {"path": str(path.relative_to(folder))} for name, path in written.items()
    }
    if not quiet:
        for name, clients in users.items():
            models[name] |= {"num_clients": len(clients), "share": len(clients) / max(1, total)}
    routing = {
        "clients": {} if quiet else {c: name for name, clients in users.items() for c in clients},
        "models": models,
        "newcomers": _newcomers(users, quiet=quiet),
    }
    text = json.dumps(routing, indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / ROUTING, text.encode())


def model_of(folder: Path, client: ClientId | None) -> Path:
    """Return the folder of the model that a client uses, by the routing file in a folder of models.

    Raises:
        ValueError: where there is no such client, or none was named and models differ.
    """
    routing = read_json(folder / ROUTING, dict, remedy="Result.export() writes it anew")
    clients: dict[ClientId, str] = routing["clients"]
    models: dict[str, Any] = routing["models"]
    if client is None and len(models) == 1:
        return folder / next(iter(models))
    if client is None or client not in clients:
        known = ", ".join(clients) or ", ".join(models)
        raise ValueError(f"client must be one of {known}, got {client!r}")
    return folder / clients[client]


def _newcomers(users: Mapping[str, Sequence[ClientId]], *, quiet: bool) -> dict[str, Any]:
    """Return which model suits a client of which nothing is known, and what would tell more."""
    if len(users) == 1:
        return {"model": next(iter(users)), "why": "it is the only one"}
    ask = "`fedloom route RUN EXAMPLES` chooses by a few examples or prompts"
    if GLOBAL in users:
        return {"model": GLOBAL, "why": f"it is the model for all; {ask}"}
    if quiet:
        return {"model": None, "why": f"nothing is told of how many use each; {ask}"}
    largest = max(users, key=lambda name: len(users[name]))
    return {
        "model": largest,
        "why": f"no other is used by more clients, and no model for all is here; {ask}",
    }
