"""Clients whose rows are there and are not used: `data.left_out`."""

from collections.abc import Collection
from dataclasses import replace

from fedloom.core.protocols import ClientId
from fedloom.data.federation import Federation


def leave_out(federation: Federation, clients: Collection[ClientId]) -> Federation:
    """Return the federation without some clients, each of the others as it is.

    Raises:
        ValueError: for a client that there is not, and where nobody is left.
    """
    manifest, gone = federation.manifest, set(clients)
    if unknown := sorted(gone - manifest.clients.keys()):
        known = ", ".join(sorted(manifest.clients)[:12])
        raise ValueError(
            f"data.left_out must be clients ({len(manifest.clients)}, first {known}), got {unknown[0]!r}"
        )
    if not any(held.rows for client, held in manifest.clients.items() if client not in gone):
        raise ValueError(
            "data.left_out leaves nobody who has something to learn from: name fewer clients"
        )
    left = replace(
        manifest,
        clients={c: held for c, held in manifest.clients.items() if c not in gone},
        profiles={c: profile for c, profile in manifest.profiles.items() if c not in gone},
    )
    return Federation(
        {c: shard for c, shard in federation.shards.items() if c not in gone},
        {c: profile for c, profile in federation.profiles.items() if c not in gone},
        left,
    )
