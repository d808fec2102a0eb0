"""Who holds what: the data of every client, tokenised and cut, with a manifest."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from fedloom.core.protocols import ClientId, Profile
from fedloom.core.randomness import derive
from fedloom.data.data_settings import DataSettings
from fedloom.data.duplicates import Duplicates, conversation, first_of_each, leaks
from fedloom.data.encoding import Tokenizer, lengths
from fedloom.data.formats import Record
from fedloom.data.labels import hidden_labels
from fedloom.data.manifest import ClientCounts, Manifest
from fedloom.data.names import safe_names
from fedloom.data.partition import PARTITIONS, Natural, stratum
from fedloom.data.preparation import SUPERVISED, Preparation
from fedloom.data.profiles import profiles_of
from fedloom.data.sharding import UNKNOWN, Labels
from fedloom.data.sources import Taken, passed_over, take_rows
from fedloom.data.splits import Cut, cut, ready
from fedloom.data.tokens import Example, Tokenised, pack


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

    Examples are tokenised before they are dealt out, so a dropped one never empties a client.
    """
    rows, read = taken.rows, objective.records(taken.rows, settings)
    found = read.records
    hashes = [conversation(record) for record in found]
    first = first_of_each(hashes)
    chosen = first if settings.duplicates == "drop" else range(len(found))
    records = [found[i] for i in chosen]
    tokenised = objective.examples(records, settings, tokenizer)
    usable = [i for i, examples in enumerate(tokenised.examples) if examples]
    _check_left(found, records, tokenised, settings, num_rows=len(rows))
    examples = [tokenised.examples[i] for i in usable]
    labels = [records[i].labels for i in usable]
    learnt = [i for i, at in enumerate(usable) if not records[at].held_out]
    held_out = [i for i, at in enumerate(usable) if records[at].held_out]
    judges = _judges(held_out, labels, settings)
    cuts = _together(_dealt(learnt, labels, [records[i].split for i in usable], settings), judges)
    leaked = leaks(cuts, [hashes[chosen[i]] for i in usable])
    # Pooling moves training examples; what they are, and what is held out, stays the same.
    sha256, untested = _hash(cuts, examples), _num_untested(cuts, settings)
    if settings.pooled:
        cuts = _pooled(cuts)
    shards = {client: _shard(parts, examples, settings) for client, parts in cuts.items()}
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
        num_unassigned=len(usable) - sum(len(parts.all) for parts in cuts.values()),
        clients={c: _counts(shards[c], cuts[c], examples, labels, hidden) for c in cuts},
        not_taken=taken.left_out,
        num_unlabelled=sum(of_record[by] == UNKNOWN for of_record in labels) if by else 0,
        num_untested=untested,
        duplicates=Duplicates(len(found) - len(first), settings.duplicates == "drop", *leaked),
        hidden=hidden,
        notes=tokenised.notes,
        losses=replace(read.losses, num_empty=read.losses.num_empty + tokenised.num_empty),
    )
    profiles = profiles_of(cuts, labels, settings, judges=judges.keys(), learnt=learnt)
    shown = {client: manifest.shown_labels(profile) for client, profile in profiles.items()}
    return Federation(shards, profiles, replace(manifest, profiles=shown))


def _kind(settings: DataSettings) -> str:
    return next(name for name, kind in PARTITIONS.items() if kind is type(settings.partition))


def _dealt(
    learnt: Sequence[int],
    labels: Sequence[Labels],
    splits: Sequence[str],
    settings: DataSettings,
) -> dict[ClientId, Cut]:
    seed = derive(settings.seed, "partition")
    some = [labels[i] for i in learnt]
    dealt = settings.partition.assign(some, settings.num_clients, seed)
    cuts = {}
    for client, places in dealt.items():
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
    return cuts


def _judges(
    held_out: Sequence[int], labels: Sequence[Labels], settings: DataSettings
) -> dict[ClientId, Cut]:
    """Return who tests on what nobody learns."""
    if settings.held_out and not held_out:
        raise ValueError(
            f"data.held_out has no example left: data.max_length {settings.max_length} cuts off their whole answers"
        )
    own = _named(settings)
    groups: dict[str, list[int]] = {}
    for i in held_out:
        groups.setdefault(labels[i][own] if own else JUDGE, []).append(i)
    names = safe_names(sorted(groups))
    return {
        f"{JUDGE}-{names[group]}" if own else JUDGE: Cut((), (), tuple(indices))
        for group, indices in groups.items()
    }


def _named(settings: DataSettings) -> str | None:
    """Return the label that clients are called by."""
    return settings.partition.by if isinstance(settings.partition, Natural) else None


def _num_untested(cuts: Mapping[ClientId, Cut], settings: DataSettings) -> int:
    wanted = settings.fractions[2] > 0
    return sum(wanted and bool(parts.train) and not parts.test for parts in cuts.values())


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


def _shard(parts: Cut, examples: ExamplesByRow, settings: DataSettings) -> Shard:
    train = _chosen(parts.train, examples)
    return Shard(
        train=pack(train, settings.max_length) if settings.packing else train,
        validation=_chosen(parts.validation, examples),
        test=_chosen(parts.test, examples),
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
        tokens=sum(len(example.ids) for example in shard.train),
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
                digest.update(json.dumps([client, split, contents]).encode() + b"\n")
    return digest.hexdigest()


def _check_left(
    found: Sequence[Record],
    records: Sequence[Record],
    tokenised: Tokenised,
    settings: DataSettings,
    *,
    num_rows: int,
) -> None:
    if not any(tokenised.examples):
        raise ValueError(_nothing_left(settings, num_rows, len(records)))
    _check_natural(found, records, tokenised, settings)


def _nothing_left(settings: DataSettings, num_rows: int, num_records: int) -> str:
    if not num_records:
        return f"data.source {settings.source} has {num_rows} rows and none with a prompt and an answer"
    what, remedy = _no_room(settings)
    return f"data.max_length is {settings.max_length}, which {what} of all {num_records} examples: {remedy}"


def _no_room(settings: DataSettings) -> tuple[str, str]:
    """Return what becomes of answers that do not fit, and what to do."""
    if settings.truncate == "prompt":
        return "has no room for the answer", "raise it"
    return "cuts off the whole answer", "raise it, or set data.truncate to prompt"


def _check_natural(
    found: Sequence[Record],
    records: Sequence[Record],
    tokenised: Tokenised,
    settings: DataSettings,
) -> None:
    """Refuse a natural client that loses all it has: the others would be split as if it had never been."""
    by = _named(settings)
    if by is None:
        return
    there = {record.labels[by] for record in found}
    single = {record.labels[by] for record in records}
    if repeated := sorted(there - single):
        raise ValueError(
            f"the client of {by} {repeated[0][:40]!r} is empty: all its rows repeat earlier ones, which data.duplicates "
            "drop leaves out; set it to keep, or leave the client out in data.where"
        )
    left: Counter[str] = Counter()
    for record, examples in zip(records, tokenised.examples, strict=True):
        left[record.labels[by]] += len(examples)
    empty = sorted(value for value, count in left.items() if not count)
    if empty:
        what, remedy = _no_room(settings)
        raise ValueError(
            f"the client of {by} {empty[0][:40]!r} is empty: data.max_length {settings.max_length} {what} of all its "
            f"examples; {remedy}, or leave it out in data.where"
        )
