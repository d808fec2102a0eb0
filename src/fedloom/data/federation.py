"""Who holds what: the data of every client, tokenised and cut, with a manifest."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedloom.core.protocols import ClientId, Profile
from fedloom.core.seeds import derive, generator
from fedloom.data.classes import class_tokens, only_classes
from fedloom.data.dealing import Labels
from fedloom.data.formats import Record, to_records
from fedloom.data.manifest import ClientCounts, Manifest
from fedloom.data.mixtures import Clusters, MultiDomain
from fedloom.data.names import safe_names
from fedloom.data.packing import pack
from fedloom.data.partition import PARTITIONS, Natural, stratum
from fedloom.data.readers import Row
from fedloom.data.settings import DataSettings
from fedloom.data.sources import load_rows, passed_over
from fedloom.data.splits import Cut, cut
from fedloom.data.tokens import Example, Tokenised, Tokenizer, lengths, tokenise


@dataclass(frozen=True, slots=True)
class Shard:
    """The examples of one client."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]


@dataclass(frozen=True, slots=True)
class Federation:
    """The data of all clients, sorted by id."""

    shards: Mapping[ClientId, Shard]
    profiles: Mapping[ClientId, Profile]
    """The labels that all examples of a client share, such as its language; its tier and its group if there are any."""
    manifest: Manifest
    classes: Mapping[str, int] = field(default_factory=dict)
    """Word -> its first token, in the order of `data.classes`; empty where answers are text."""


POOL: ClientId = "pool"
"""Who holds all training examples where `data.pooled` is set."""
JUDGE: ClientId = "held-out"
"""Who holds what `data.held_out` names; `held-out-VALUE` where the partition is natural."""

Kept = Sequence[tuple[Example, ...]]
"""The examples of each record that has any."""


def federate(settings: DataSettings, tokenizer: Tokenizer) -> Federation:
    """Read, tokenise and split: the same settings give the same federation on every machine."""
    rows = load_rows(settings, lambda texts: lengths(texts, tokenizer))
    federation = divide(rows, settings, tokenizer)
    manifest = replace(federation.manifest, files_unread=passed_over(settings))
    return replace(federation, manifest=manifest)


def divide(rows: Sequence[Row], settings: DataSettings, tokenizer: Tokenizer) -> Federation:
    """Tokenise and split rows.

    Examples are tokenised before they are dealt out, so a dropped one never empties a client.
    """
    read = to_records(rows, settings)
    records = read.records
    tokenised = tokenise(records, settings, tokenizer)
    classes = class_tokens(settings, tokenizer)
    if classes:
        tokenised = only_classes(tokenised, classes)
    kept = [i for i, examples in enumerate(tokenised.examples) if examples]
    if not kept:
        raise ValueError(_nothing_left(settings, len(rows), len(records)))
    _check_natural(records, tokenised, settings)
    examples = [tokenised.examples[i] for i in kept]
    labels = [records[i].labels for i in kept]
    learnt = [i for i, at in enumerate(kept) if not records[at].held_out]
    held_out = [i for i, at in enumerate(kept) if records[at].held_out]
    judges = _judges(held_out, labels, settings)
    cuts = _together(_dealt(learnt, labels, settings), judges)
    # Pooling moves training examples; what they are, and what is held out, stays the same.
    sha256 = _hash(cuts, examples)
    if settings.pooled:
        cuts = _pooled(cuts)
    shards = {client: _shard(parts, examples, settings) for client, parts in cuts.items()}
    manifest = Manifest(
        sha256=sha256,
        source=settings.source,
        partition=_kind(settings),
        by=stratum(settings.partition),
        seed=settings.seed,
        max_length=settings.max_length,
        num_rows=len(rows),
        num_empty=read.losses.num_empty,
        num_dropped=tokenised.num_dropped,
        num_truncated=tokenised.num_truncated,
        num_unassigned=len(kept) - sum(len(parts.all) for parts in cuts.values()),
        clients={c: _counts(shards[c], cuts[c], examples, labels) for c in cuts},
        losses=read.losses,
    )
    learners = [client for client, parts in cuts.items() if parts.all and client not in judges]
    tiers = {**_tiers(learners, settings), **_tiers(list(judges), settings)}
    groups = _groups([labels[i] for i in learnt], settings)
    profiles = {
        client: {
            **_shared([labels[i] for i in parts.all]),
            **tiers.get(client, {}),
            **groups.get(client, {}),
        }
        for client, parts in cuts.items()
    }
    return Federation(shards, profiles, manifest, classes)


def _kind(settings: DataSettings) -> str:
    return next(name for name, kind in PARTITIONS.items() if kind is type(settings.partition))


def _dealt(
    learnt: Sequence[int], labels: Sequence[Labels], settings: DataSettings
) -> dict[ClientId, Cut]:
    seed = derive(settings.seed, "partition")
    some = [labels[i] for i in learnt]
    return {
        client: cut(
            [learnt[i] for i in indices],
            labels,
            by=stratum(settings.partition),
            fractions=settings.fractions,
            seed=derive(seed, "cut", client),
        )
        for client, indices in settings.partition.assign(some, settings.num_clients, seed).items()
    }


def _judges(
    held_out: Sequence[int], labels: Sequence[Labels], settings: DataSettings
) -> dict[ClientId, Cut]:
    """Return who tests on what nobody learns."""
    if settings.held_out and not held_out:
        raise ValueError(
            f"data.held_out has no example left: data.max_length {settings.max_length} cuts off their whole answers"
        )
    own = settings.partition.by if isinstance(settings.partition, Natural) else None
    groups: dict[str, list[int]] = {}
    for i in held_out:
        groups.setdefault(f"{JUDGE}-{labels[i][own]}" if own else JUDGE, []).append(i)
    names = safe_names(sorted(groups))
    return {names[group]: Cut((), (), tuple(indices)) for group, indices in groups.items()}


def _together(
    learners: Mapping[ClientId, Cut], judges: Mapping[ClientId, Cut]
) -> dict[ClientId, Cut]:
    if twice := sorted(judges.keys() & learners.keys()):
        raise ValueError(
            f"data.held_out adds a client {twice[0]}, but one that learns is called so"
        )
    return dict(sorted({**learners, **judges}.items()))


def _pooled(cuts: Mapping[ClientId, Cut]) -> dict[ClientId, Cut]:
    train = tuple(sorted(i for parts in cuts.values() for i in parts.train))
    # A natural client may be called like it.
    name = POOL if POOL not in cuts else f"{POOL}-of-all"
    judges = {client: replace(parts, train=()) for client, parts in cuts.items()}
    return dict(sorted({**judges, name: Cut(train, (), ())}.items()))


def _shard(parts: Cut, examples: Kept, settings: DataSettings) -> Shard:
    train = _chosen(parts.train, examples)
    return Shard(
        train=pack(train, settings.max_length) if settings.packing else train,
        validation=_chosen(parts.validation, examples),
        test=_chosen(parts.test, examples),
    )


def _chosen(indices: Sequence[int], examples: Kept) -> list[Example]:
    return [example for i in indices for example in examples[i]]


def _counts(shard: Shard, parts: Cut, examples: Kept, labels: Sequence[Labels]) -> ClientCounts:
    values = [labels[i] for i in parts.all]
    return ClientCounts(
        train=len(_chosen(parts.train, examples)),
        validation=len(shard.validation),
        test=len(shard.test),
        rows=len(shard.train),
        tokens=sum(len(example.ids) for example in shard.train),
        target_tokens=sum(example.num_targets for example in shard.train),
        labels={
            name: dict(sorted(Counter(of_record[name] for of_record in values).items()))
            for name in labels[0]
        },
    )


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


def _hash(cuts: Mapping[ClientId, Cut], examples: Kept) -> str:
    digest = hashlib.sha256()
    for client, parts in cuts.items():
        splits = {"train": parts.train, "validation": parts.validation, "test": parts.test}
        for split, indices in splits.items():
            for example in _chosen(indices, examples):
                assert example.record is not None  # only packed rows lose theirs
                said = [[message.role, message.content] for message in example.record.messages]
                digest.update(json.dumps([client, split, said]).encode() + b"\n")
    return digest.hexdigest()


def _nothing_left(settings: DataSettings, num_rows: int, num_records: int) -> str:
    if not num_records:
        return f"data.source {settings.source} has {num_rows} rows and none with a prompt and an answer"
    return (
        f"data.max_length is {settings.max_length}, which cuts off the whole answer of all {num_records} examples: "
        "raise it, or set data.truncate to prompt"
    )


def _check_natural(records: Sequence[Record], tokenised: Tokenised, settings: DataSettings) -> None:
    """Refuse a natural client that loses all it has: the others would be split as if it had never been."""
    if not isinstance(settings.partition, Natural):
        return
    by = settings.partition.by
    left: Counter[str] = Counter()
    for record, examples in zip(records, tokenised.examples, strict=True):
        left[record.labels[by]] += len(examples)
    empty = sorted(value for value, count in left.items() if not count)
    if empty:
        raise ValueError(
            f"the client of {by} {empty[0]!r} is empty: data.max_length {settings.max_length} cuts off the whole "
            "answer of all its examples; raise it, set data.truncate to prompt, or leave it out in data.where"
        )
