"""Who holds what: the data of every client, tokenised and cut, with a manifest."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from fedloom.core.protocols import ClientId, Profile
from fedloom.core.randomness import derive
from fedloom.data.data_settings import DataSettings
from fedloom.data.duplicates import Duplicates, conversation, first_of_each, leaks
from fedloom.data.encoding import Tokenizer, lengths
from fedloom.data.exclusion import Excluded, exclude
from fedloom.data.formats import Record, renamed
from fedloom.data.labels import hidden_labels
from fedloom.data.manifest import ClientCounts, Manifest
from fedloom.data.names import safe_names
from fedloom.data.partition import PARTITIONS, Natural, Partition, stratum
from fedloom.data.preparation import SUPERVISED, Joining, Preparation
from fedloom.data.profiles import profiles_of
from fedloom.data.readers import Row
from fedloom.data.sharding import UNKNOWN, Labels
from fedloom.data.sources import Taken, passed_over, take_rows
from fedloom.data.splits import Cut, cut, ready
from fedloom.data.tokens import Example, pack


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


POOL: ClientId = "pool"
"""Who holds all training examples where `data.pooled` is set."""
JUDGE: ClientId = "held-out"
"""Who holds what `data.held_out` names; `held-out-VALUE` where the partition is natural."""

ExamplesByRow = Sequence[tuple[Example, ...]]
"""The examples of each record that has any."""


def federate(
    settings: DataSettings, tokenizer: Tokenizer, objective: Preparation = SUPERVISED
) -> Federation:
    """Read, tokenise and split: the same settings give the same federation on every machine."""
    taken = take_rows(settings, lambda texts: lengths(texts, tokenizer))
    federation = divide(taken, settings, tokenizer, objective)
    manifest = replace(federation.manifest, files_unread=tuple(passed_over(settings)))
    return replace(federation, manifest=manifest)


def divide(
    taken: Taken, settings: DataSettings, tokenizer: Tokenizer, objective: Preparation = SUPERVISED
) -> Federation:
    """Tokenise and split rows.

    Examples are tokenised before they are dealt out. A natural client may lose all it has even so: who is left with too
    few is left out, and the others hold what they would hold beside it.
    """
    rows, read = taken.rows, objective.records(taken.rows, settings)
    found = read.records
    hashes = [conversation(record) for record in found]
    first = first_of_each(hashes, found)
    chosen = first if settings.duplicates == "drop" else range(len(found))
    records = [found[i] for i in chosen]
    tokenised = objective.examples(records, settings, tokenizer)
    usable = [i for i, examples in enumerate(tokenised.examples) if examples]
    if not usable:
        raise ValueError(_nothing_left(settings, len(rows), len(records), read.losses.lines()))
    examples, held = [tokenised.examples[i] for i in usable], [records[i] for i in usable]
    labels = [record.labels for record in held]
    cuts, judges, excluded = _cuts(held, examples, rows, settings)
    unseen = _unseen(cuts, judges, settings)
    leaked = leaks(_learnt(cuts, unseen), [hashes[chosen[i]] for i in usable])
    # Pooling moves training examples; what they are, and what is held out, stays the same.
    sha256, untested = _hash(cuts, examples), _num_untested(cuts, settings)
    cuts = _pooled(cuts, unseen) if settings.pooled else cuts
    shards = {c: _shard(parts, examples, settings, objective) for c, parts in cuts.items()}
    by = stratum(settings.partition)
    hidden = hidden_labels(labels, named=_named(settings), known=objective.classes)
    manifest = Manifest(
        sha256=sha256,
        source=settings.source,
        partition=_kind(settings),
        by=by,
        seed=settings.seed,
        max_length=settings.max_length,
        num_rows=len(rows) + sum(taken.left_out.values()),
        num_dropped=tokenised.num_dropped,
        num_truncated=tokenised.num_truncated,
        num_unassigned=len(held) - excluded.num_rows - sum(len(p.all) for p in cuts.values()),
        clients={c: _counts(shards[c], cuts[c], examples, labels, hidden) for c in cuts},
        not_taken=taken.left_out,
        num_unlabelled=sum(of_record[by] == UNKNOWN for of_record in labels) if by else 0,
        num_untested=untested,
        duplicates=Duplicates(len(found) - len(first), settings.duplicates == "drop", *leaked),
        hidden=hidden,
        notes=tokenised.notes,
        losses=read.losses.more(num_empty=tokenised.num_empty, num_equal=tokenised.num_equal),
        prompt=tokenised.prompt,
        excluded=excluded,
        unseen=unseen,
    )
    profiles = profiles_of(cuts, held, settings, judges=judges, excluded=excluded.clients)
    shown = {client: manifest.shown_labels(profile) for client, profile in profiles.items()}
    return Federation(shards, profiles, replace(manifest, profiles=shown))


def _kind(settings: DataSettings) -> str:
    return next(name for name, kind in PARTITIONS.items() if kind is type(settings.partition))


def _cuts(
    records: Sequence[Record], examples: ExamplesByRow, rows: Sequence[Row], settings: DataSettings
) -> tuple[dict[ClientId, Cut], Collection[ClientId], Excluded]:
    """Return who holds which records, who of them is there to be judged only, and who is left out."""
    judges, lost = _judges(records, rows, settings)
    dealt, testers = _dealt(records, rows, settings)
    sizes = [len(each) for each in examples]
    learners, excluded = exclude(dealt, sizes, settings.min_examples, testers=testers)
    return _together(learners, judges), judges.keys(), replace(excluded, judges=lost)


def _dealt(
    records: Sequence[Record], rows: Sequence[Row], settings: DataSettings
) -> tuple[dict[ClientId, Cut], set[ClientId]]:
    """Return every client's cut, empty where it lost all it brought, and the clients that brought nothing to learn."""
    seed = derive(settings.seed, "partition")
    labels, splits = [one.labels for one in records], [one.split for one in records]
    learnt = [i for i, record in enumerate(records) if not record.held_out]
    some = [labels[i] for i in learnt]
    brought = _values(
        [row for row in rows if not row.held_out and row.split in ("", "train")], settings
    )
    partition, lost = _without_lost(brought, some, settings.partition)
    cuts = {}
    for client, places in partition.assign(some, settings.num_clients, seed).items():
        indices = [learnt[i] for i in places]
        # A client's rows come all cut, or not at all.
        if any(splits[i] for i in indices):
            cuts[client] = ready(indices, splits)
            continue
        cuts[client] = cut(
            indices,
            labels,
            by=stratum(settings.partition),
            fractions=settings.fractions,
            seed=derive(seed, "cut", client),
        )
    own = _named(settings)
    if own is None:
        return cuts, set()
    values = {labels[parts.all[0]][own]: client for client, parts in cuts.items()}
    # The names of those that hold something come first, and are what they are without the others.
    names = safe_names([*sorted(values), *lost])
    testers = {client for value, client in values.items() if value not in brought}
    return cuts | {names[value]: Cut((), (), ()) for value in lost}, testers


def _values(rows: Sequence[Row], settings: DataSettings) -> set[str]:
    """Return the natural clients that rows are of, usable or not; other clients have no rows before they are dealt."""
    by = _named(settings)
    if by is None:
        return set()
    return {renamed(row, settings.columns).text(by) or UNKNOWN for row in rows}


def _without_lost(
    brought: set[str], labels: Sequence[Labels], partition: Partition
) -> tuple[Partition, list[str]]:
    """Return the partition of those that have an example left, and the natural clients that have none."""
    if not isinstance(partition, Natural):
        return partition, []
    left = {of_example[partition.by] for of_example in labels}
    lost = sorted(brought - left)
    if partition.largest is None:
        return partition, lost
    # Who lost all it has is among the `largest` only where there are no more others.
    room = max(0, partition.largest - len(left))
    if room > len(lost):
        return partition, lost
    return replace(partition, largest=partition.largest - room or None), lost[:room]


def _judges(
    records: Sequence[Record], rows: Sequence[Row], settings: DataSettings
) -> tuple[dict[ClientId, Cut], tuple[ClientId, ...]]:
    """Return who tests on what nobody learns, and who would, had it an example left."""
    held_out = [i for i, record in enumerate(records) if record.held_out]
    if settings.held_out and not held_out:
        raise ValueError(
            f"data.held_out has no example left: data.max_length {settings.max_length} cuts off their whole answers"
        )
    own = _named(settings)
    groups: dict[str, list[int]] = {}
    for i in held_out:
        groups.setdefault(records[i].labels[own] if own else JUDGE, []).append(i)
    lost = sorted(_values([row for row in rows if row.held_out], settings) - groups.keys())
    names = safe_names([*sorted(groups), *lost])
    judges = {
        f"{JUDGE}-{names[group]}" if own else JUDGE: Cut((), (), tuple(indices))
        for group, indices in groups.items()
    }
    return judges, tuple(f"{JUDGE}-{names[group]}" for group in lost)


def _named(settings: DataSettings) -> str | None:
    """Return the label that clients are called by."""
    return settings.partition.by if isinstance(settings.partition, Natural) else None


def _num_untested(cuts: Mapping[ClientId, Cut], settings: DataSettings) -> int:
    wanted = settings.fractions[2] > 0
    return sum(wanted and bool(parts.train) and not parts.test for parts in cuts.values())


def _unseen(
    cuts: Mapping[ClientId, Cut], judges: Collection[ClientId], settings: DataSettings
) -> tuple[ClientId, ...]:
    """Return the clients that never train, as `data.unseen` asks, sorted by id."""
    if not settings.unseen:
        return ()
    learners = [c for c, parts in cuts.items() if parts.train and c not in judges]
    able = [client for client in learners if cuts[client].test]
    wanted = math.floor(settings.unseen * len(learners) + 0.5)
    if not 0 < wanted <= min(len(able), len(learners) - 1):
        raise ValueError(
            f"data.unseen is {settings.unseen:g} of {len(learners)} clients that learn, {len(able)} of which have test rows:"
            f" that must come to at least one client and leave one to train, got {wanted}"
        )
    seed = derive(settings.seed, "unseen")
    return tuple(sorted(sorted(able, key=lambda client: derive(seed, client))[:wanted]))


def _learnt(cuts: Mapping[ClientId, Cut], unseen: Collection[ClientId]) -> dict[ClientId, Cut]:
    """Return the cuts without what clients that never train hold to learn from."""
    return {c: replace(parts, train=()) if c in unseen else parts for c, parts in cuts.items()}


def _together(
    learners: Mapping[ClientId, Cut], judges: Mapping[ClientId, Cut]
) -> dict[ClientId, Cut]:
    if twice := sorted(judges.keys() & learners.keys()):
        raise ValueError(
            f"data.held_out adds a client {twice[0]}, but one that learns is called so"
        )
    return dict(sorted({**learners, **judges}.items()))


def _pooled(cuts: Mapping[ClientId, Cut], unseen: Collection[ClientId]) -> dict[ClientId, Cut]:
    """Return all training rows at one more client, but for those of clients that never train, which keep them."""
    train = tuple(sorted(i for parts in _learnt(cuts, unseen).values() for i in parts.train))
    # A natural client may be called like it.
    name = POOL if POOL not in cuts else f"{POOL}-of-all"
    judges = {c: parts if c in unseen else replace(parts, train=()) for c, parts in cuts.items()}
    return dict(sorted({**judges, name: Cut(train, (), ())}.items()))


def _shard(
    parts: Cut, examples: ExamplesByRow, settings: DataSettings, objective: Preparation
) -> Shard:
    splits = [_chosen(indices, examples) for indices in (parts.train, parts.validation, parts.test)]
    if isinstance(objective, Joining):
        splits = [objective.joined(split, settings) for split in splits]
    train, validation, test = splits
    return Shard(
        train=pack(train, settings.max_length) if settings.packing else train,
        validation=validation,
        test=test,
    )


def _chosen(indices: Sequence[int], examples: ExamplesByRow) -> list[Example]:
    return [example for i in indices for example in examples[i]]


def _counts(
    shard: Shard,
    parts: Cut,
    examples: ExamplesByRow,
    labels: Sequence[Labels],
    hidden: Collection[str],
) -> ClientCounts:
    counts = {name: Counter(labels[i][name] for i in parts.all) for name in labels[0]}
    return ClientCounts(
        train=len(_chosen(parts.train, examples)),
        validation=len(shard.validation),
        test=len(shard.test),
        rows=len(shard.train),
        tokens=sum(example.num_tokens for example in shard.train),
        target_tokens=sum(example.num_targets for example in shard.train),
        labels={
            name: dict(sorted(of_client.items()))
            for name, of_client in counts.items()
            if name not in hidden
        },
        num_values={name: len(of_client) for name, of_client in counts.items() if name in hidden},
    )


def _hash(cuts: Mapping[ClientId, Cut], examples: ExamplesByRow) -> str:
    digest = hashlib.sha256()
    for client, parts in cuts.items():
        splits = {"train": parts.train, "validation": parts.validation, "test": parts.test}
        for split, indices in splits.items():
            for example in _chosen(indices, examples):
                assert example.record is not None  # only packed rows lose theirs
                contents = [
                    [message.role, message.content, *([] if message.learn else ["given"])]
                    for message in example.record.messages
                ]
                if example.record.tools:
                    contents.append(["tools", example.record.tools])
                if example.good is not None:
                    contents.append(["good", example.record.rejected or str(example.good)])
                digest.update(json.dumps([client, split, contents]).encode() + b"\n")
    return digest.hexdigest()


def _nothing_left(
    settings: DataSettings, num_rows: int, num_records: int, lost: Sequence[str]
) -> str:
    if not num_records:
        why = f" ({'; '.join(lost)})" if lost else ""
        return f"data.source {settings.source} has {num_rows} rows and none with a prompt and an answer{why}"
    what, remedy = _no_room(settings)
    return f"data.max_length is {settings.max_length}, which {what} of all {num_records} examples: {remedy}"


def _no_room(settings: DataSettings) -> tuple[str, str]:
    """Return what becomes of answers that do not fit, and what to do."""
    if settings.truncate == "prompt":
        return "has no room for the answer", "raise it"
    return "cuts off the whole answer", "raise it, or set data.truncate to prompt"
