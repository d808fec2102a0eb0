"""What is known of every client besides its counts: labels that all its examples share, its tier, its group."""

from collections.abc import Collection, Mapping, Sequence

import torch

from fedloom.core.protocols import ClientId, Profile
from fedloom.core.randomness import generator
from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import Record
from fedloom.data.mixtures import Clusters, MultiDomain
from fedloom.data.sharding import Labels
from fedloom.data.splits import Cut


def profiles_of(
    cuts: Mapping[ClientId, Cut],
    records: Sequence[Record],
    settings: DataSettings,
    *,
    judges: Collection[ClientId],
    excluded: Collection[ClientId],
) -> dict[ClientId, Profile]:
    """Return the profile of every client.

    Args:
        cuts: Indices of every client's records.
        records: All that make examples, held out or not.
        settings: The recipe's section.
        judges: Clients that only test.
        excluded: Clients that were dealt examples and are left out; the tiers of the others are drawn beside theirs.
    """
    learners = {client for client, parts in cuts.items() if parts.all and client not in judges}
    tiers = {**_tiers(sorted(learners.union(excluded)), settings), **_tiers(list(judges), settings)}
    groups = _groups([one.labels for one in records if not one.held_out], settings)
    return {
        client: {
            **_shared([records[i].labels for i in parts.all]),
            **tiers.get(client, {}),
            **groups.get(client, {}),
        }
        for client, parts in cuts.items()
    }


def _shared(labels: Sequence[Labels]) -> Profile:
    """Return the labels that do not vary; a client of a pooled run may be left with no example at all."""
    first = labels[0] if labels else {}
    return {name: first[name] for name in first if all(one[name] == first[name] for one in labels)}


def _groups(labels: Sequence[Labels], settings: DataSettings) -> Mapping[ClientId, Profile]:
    """Return the group of each client where they are dealt out in groups; a mixed client shares no label."""
    if not isinstance(settings.partition, Clusters | MultiDomain):
        return {}
    groups = settings.partition.groups(labels, settings.num_clients)
    return {client: {"group": group} for client, group in groups.items()}


def _tiers(clients: Sequence[ClientId], settings: DataSettings) -> Mapping[ClientId, Profile]:
    """Deal the tiers out, each to its share of the clients, rounded where the shares before it end."""
    source = generator(settings.seed, "tiers")
    drawn = [clients[i] for i in torch.randperm(len(clients), generator=source).tolist()]
    tiers: dict[ClientId, Profile] = {}
    share = 0.0
    for tier, part in settings.tiers.items():
        share += part
        for client in drawn[len(tiers) : round(share * len(drawn))]:
            tiers[client] = {"tier": tier}
    return tiers
