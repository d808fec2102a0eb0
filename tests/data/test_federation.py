"""From settings to the data of every client: what is counted, what is the same, what is refused."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.data.data_settings import DataSettings
from fedloom.data.federation import Federation, Shard, federate
from fedloom.data.manifest import Manifest
from fedloom.data.partition import Dirichlet, Iid, Natural, Shards
from fedloom.data.tokens import IGNORED, Example

LANGUAGES = ("da", "de", "en", "sv")


def rows(count: int = 240) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"Question {i}?",
            "completion": f"Answer {i}",
            "language": LANGUAGES[i % 4],
            "task": f"t{i % 3}",
        }
        for i in range(count)
    ]


@pytest.fixture
def base(written: Callable[..., str]) -> DataSettings:
    return DataSettings(
        source=written("rows.jsonl", rows()), prompt="plain", num_clients=4, max_length=64
    )


def said(examples: Any) -> list[str]:
    return [example.record.messages[0].content for example in examples]


def everything(federation: Federation) -> list[str]:
    shards = federation.shards.values()
    return [
        text
        for shard in shards
        for split in (shard.train, shard.validation, shard.test)
        for text in said(split)
    ]


# --- a federation --------------------------------------------------------------------------------


def test_every_row_is_in_one_split_of_one_client(base: DataSettings, byte_level: Any):
    """Sizes sum, disjoint."""
    federation = federate(base, byte_level)
    assert sorted(everything(federation)) == sorted(row["prompt"] for row in rows())
    assert list(federation.shards) == list(federation.profiles) == list(federation.manifest.clients)
    assert [len(shard.train) for shard in federation.shards.values()] == [48] * 4


def test_the_same_settings_give_the_same_federation(base: DataSettings, byte_level: Any):
    """A seed-stable hash."""
    one, two = federate(base, byte_level), federate(base, byte_level)
    assert one.manifest == two.manifest
    assert everything(one) == everything(two)
    for a, b in zip(one.shards["client-000"].train, two.shards["client-000"].train, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.labels, b.labels)
    other = federate(replace(base, seed=1), byte_level).manifest
    assert other.sha256 != one.manifest.sha256
    assert one.manifest.sha256 == (
        "38f4d7d58385441abf673ef34b8f438547a2d326c0ef01cbea6d49c9094e9ad4"
    ), "on every machine"


def histogram(examples: Any, label: str) -> Counter[str]:
    return Counter(example.record.labels[label] for example in examples)


@pytest.mark.parametrize(
    "partition", [Natural("language"), Shards("language", per_client=2)], ids=str
)
def test_a_client_has_the_same_categories_in_every_split(
    partition: Any, base: DataSettings, byte_level: Any
):
    """FederatedScope's meta splitter gave 9 of 9 clients other test categories than they had learnt."""
    count = None if isinstance(partition, Natural) else base.num_clients
    settings = replace(base, partition=partition, num_clients=count)
    for shard in federate(settings, byte_level).shards.values():
        train = set(histogram(shard.train, "language"))
        assert (
            train
            == set(histogram(shard.validation, "language"))
            == set(histogram(shard.test, "language"))
        )


def chi_square(shard: Shard) -> float:
    """Return the distance of a client's training and test languages (3 degrees of freedom)."""
    both = [histogram(shard.train, "language"), histogram(shard.test, "language")]
    whole = both[0] + both[1]
    expected = [
        {name: whole[name] * counts.total() / whole.total() for name in whole} for counts in both
    ]
    pairs = zip(both, expected, strict=True)
    return sum(
        (counts[name] - share[name]) ** 2 / share[name] for counts, share in pairs for name in whole
    )


def test_the_splits_of_a_skewed_client_come_from_one_distribution(
    base: DataSettings, byte_level: Any
):
    """LDA: the chi-square distance of train and test is bounded for every client.

    7.81 is the 5 % point of 3 degrees of freedom. Splits drawn at random from one distribution have a mean near
    2.6 here and cross that point in one case of twenty; stratified ones differ by rounding, so their mean is
    below 1 and none crosses it.
    """
    partition = Dirichlet("language", alpha=0.5, min_examples=10)
    settings = replace(base, partition=partition, fractions=(0.6, 0.1, 0.3))
    distances = [
        chi_square(shard)
        for seed in range(12)
        for shard in federate(replace(settings, seed=seed), byte_level).shards.values()
    ]
    assert len(distances) == 48
    assert max(distances) < 7.81
    assert sum(distances) / len(distances) < 1


def test_natural_clients_are_called_by_their_name_and_known_by_it(
    base: DataSettings, byte_level: Any
):
    federation = federate(
        replace(base, partition=Natural("language"), num_clients=None), byte_level
    )
    assert list(federation.shards) == list(LANGUAGES)
    assert federation.profiles["de"] == {"language": "de"}
    assert federate(base, byte_level).profiles["client-000"] == {}


# --- the manifest --------------------------------------------------------------------------------


def hospitals(written: Callable[..., str], values: Sequence[object], **given: Any) -> DataSettings:
    rows = [
        {"prompt": f"Dose {i}?", "completion": f"{i} mg", "hospital": value}
        for i, value in enumerate(values)
    ]
    return DataSettings(
        source=written("mine.jsonl", rows), prompt="plain", partition=Natural("hospital"), **given
    )


def test_clients_too_small_for_a_test_split_are_said(written: Callable[..., str], byte_level: Any):
    manifest = federate(hospitals(written, ["a"] * 9 + ["b"] * 2 + ["c"]), byte_level).manifest
    splits = [(c.train, c.validation, c.test) for c in manifest.clients.values()]
    assert splits == [(7, 1, 1), (1, 1, 0), (1, 0, 0)]
    said = "2 clients with too few examples for a test split, learnt from and not measured"
    assert manifest.left_out() == [said]


def test_rows_without_the_label_are_a_client_and_said(written: Callable[..., str], byte_level: Any):
    values = ["a"] * 9 + [None] * 9 + [""] * 3
    manifest = federate(hospitals(written, values), byte_level).manifest
    assert list(manifest.clients) == ["a", "unknown"]
    said = "12 rows whose hospital is missing, or unknown, kept as a client called so"
    assert manifest.left_out() == ["empty (null or NaN): hospital (9 rows)", said]


def test_rows_that_settings_leave_out_are_said(written: Callable[..., str], byte_level: Any):
    settings = hospitals(
        written, ["a", "b", "c"] * 20, where={"hospital": ["a", "b"]}, num_examples=30
    )
    manifest = federate(settings, byte_level).manifest
    assert manifest.left_out() == [
        "20 rows left out by data.where",
        "10 rows left out by data.num_examples",
    ]
    assert manifest.num_rows == 60
    assert sum(c.train + c.validation + c.test for c in manifest.clients.values()) == 30


def test_the_manifest_counts_what_there_is(base: DataSettings, byte_level: Any):
    federation = federate(
        replace(base, partition=Natural("language", 3), num_clients=None), byte_level
    )
    manifest = federation.manifest
    assert (manifest.partition, manifest.by, manifest.num_rows, manifest.num_unassigned) == (
        "natural",
        "language",
        240,
        60,
    )
    client, shard = manifest.clients["da"], federation.shards["da"]
    assert (client.train, client.validation, client.test, client.rows) == (48, 6, 6, 48)
    assert client.tokens == sum(len(example.ids) for example in shard.train)
    assert client.target_tokens == sum(
        int((example.labels != IGNORED).sum()) for example in shard.train
    )
    assert client.labels == {"language": {"da": 60}, "task": {"t0": 20, "t1": 20, "t2": 20}}


def test_the_manifest_goes_through_json(base: DataSettings, byte_level: Any):
    manifest = federate(base, byte_level).manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_empty_truncated_and_dropped_examples_are_counted_and_nobody_gets_them(
    written: Callable[..., str], byte_level: Any
):
    """Truncated-away answers are reported and dropped, not NaN."""
    given = rows(40)
    given[3]["completion"] = ""
    given[4]["completion"] = "Answer " * 40
    given[5]["prompt"] = "Question " * 40
    settings = DataSettings(
        source=written("a.jsonl", given), prompt="plain", max_length=32, num_clients=2
    )
    federation = federate(settings, byte_level)
    manifest = federation.manifest
    assert (
        manifest.num_rows,
        manifest.num_empty,
        manifest.num_truncated,
        manifest.num_dropped,
    ) == (40, 1, 1, 1)
    assert (
        sum(client.train + client.validation + client.test for client in manifest.clients.values())
        == 38
    )
    everybody = [
        e
        for shard in federation.shards.values()
        for e in (*shard.train, *shard.validation, *shard.test)
    ]
    assert all(example.num_targets for example in everybody)


# --- packing and pooling -------------------------------------------------------------------------


def test_packing_joins_training_examples_only(base: DataSettings, byte_level: Any):
    plain, packed = federate(base, byte_level), federate(replace(base, packing=True), byte_level)
    assert packed.manifest.sha256 == plain.manifest.sha256
    for name, shard in packed.shards.items():
        before, after = plain.manifest.clients[name], packed.manifest.clients[name]
        assert (after.train, after.tokens, after.target_tokens) == (
            before.train,
            before.tokens,
            before.target_tokens,
        )
        assert len(shard.train) == after.rows < before.rows
        assert all(row.positions is not None and row.record is None for row in shard.train)
        assert said(shard.test) == said(plain.shards[name].test)


def test_pooling_moves_the_training_examples_and_nothing_else(base: DataSettings, byte_level: Any):
    apart, pooled = federate(base, byte_level), federate(replace(base, pooled=True), byte_level)
    assert pooled.manifest.sha256 == apart.manifest.sha256
    assert set(pooled.shards) == {*apart.shards, "pool"}
    everybody = [text for shard in apart.shards.values() for text in said(shard.train)]
    assert sorted(said(pooled.shards["pool"].train)) == sorted(everybody)
    assert not pooled.shards["pool"].test
    for name, shard in apart.shards.items():
        assert not pooled.shards[name].train
        assert said(pooled.shards[name].test) == said(shard.test)


def test_tiers_are_dealt_out_by_their_shares_and_nothing_else_changes(
    base: DataSettings, byte_level: Any
):
    plain = federate(base, byte_level)
    tiers = {"phone": 0.5, "desk": 0.3, "server": 0.2}
    tiered = federate(replace(base, tiers=tiers), byte_level)
    sharded = {client: profile["tier"] for client, profile in tiered.profiles.items()}
    clients, count = len(sharded), Counter(sharded.values())
    assert all(abs(count[tier] - share * clients) < 1 for tier, share in tiers.items())
    assert replace(tiered.manifest, profiles=plain.profiles) == plain.manifest
    assert tiered.manifest.profiles == tiered.profiles
    assert federate(replace(base, tiers=tiers), byte_level).profiles == tiered.profiles
    others = [{n: v for n, v in p.items() if n != "tier"} for p in tiered.profiles.values()]
    assert others == list(plain.profiles.values())
    assert set(sharded.values()) == set(tiers)


def test_pooling_without_held_out_examples_leaves_the_others_nothing(
    base: DataSettings, byte_level: Any
):
    pooled = federate(replace(base, pooled=True, fractions=(1.0, 0.0, 0.0)), byte_level)
    assert pooled.shards["client-000"] == Shard([], [], [])
    assert pooled.profiles["client-000"] == {}


def test_a_natural_client_may_be_called_pool(written: Callable[..., str], byte_level: Any):
    given = [{"prompt": "a", "completion": "b", "file": name} for name in ("pool", "lake") * 5]
    settings = DataSettings(
        source=written("a.jsonl", given), prompt="plain", partition=Natural("file"), pooled=True
    )
    assert set(federate(settings, byte_level).shards) == {"lake", "pool", "pool-of-all"}


# --- conversations that became several sequences -------------------------------------------------


def test_the_answers_of_one_conversation_stay_together(
    written: Callable[..., str], tokenizers: dict[str, Any]
):
    forgetful = (
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}!{% endif %}{{ m.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = ["user", "assistant", "user", "assistant"]
    given = [{"messages": [{"role": role, "content": f"{i}"} for role in turns]} for i in range(30)]
    settings = DataSettings(source=written("a.jsonl", given), num_clients=3)

    class Forgetful(type(tokenizers["byte_level"])):  # type: ignore[misc]  # a fixture's class
        pass

    tokenizer = Forgetful(
        tokenizer_object=tokenizers["byte_level"].backend_tokenizer, eos_token="</s>"
    )
    tokenizer.chat_template = forgetful
    federation = federate(settings, tokenizer)
    holders: dict[str, set[tuple[str, str]]] = {}
    for client, shard in federation.shards.items():
        for split, examples in (
            ("train", shard.train),
            ("validation", shard.validation),
            ("test", shard.test),
        ):
            for text in said(examples):
                holders.setdefault(text, set()).add((client, split))
    assert len(holders) == 30
    assert all(len(places) == 1 for places in holders.values())
    assert sum(c.train + c.validation + c.test for c in federation.manifest.clients.values()) == 60


# --- what is refused -----------------------------------------------------------------------------


def test_more_clients_than_examples_is_an_error(base: DataSettings, byte_level: Any):
    message = "data.num_clients is 241 with at least 1 examples each, but there are only 240 examples: lower it, or give more data"
    with pytest.raises(ValueError, match=re.escape(message)):
        federate(replace(base, num_clients=241), byte_level)


def test_nothing_left_says_why(written: Callable[..., str], byte_level: Any):
    path = written("a.jsonl", [{"prompt": "Question " * 20, "completion": "b"}] * 3)
    message = "data.max_length is 16, which cuts off the whole answer of all 3 examples: raise it, or set data.truncate to prompt"
    with pytest.raises(ValueError, match=re.escape(message)):
        federate(DataSettings(source=path, prompt="plain", max_length=16), byte_level)
    path = written("b.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    message = "b.jsonl has 3 rows and none with a prompt and an answer (3 rows without an answer, left out)"
    with pytest.raises(ValueError, match=re.escape(message)):
        federate(DataSettings(source=path, prompt="plain"), byte_level)


def test_a_natural_client_that_loses_everything_is_left_out_and_reported(
    written: Callable[..., str], byte_level: Any
):
    given = rows(40)
    for row in given:
        if row["language"] == "de":
            row["prompt"] *= 10
    settings = DataSettings(
        source=written("a.jsonl", given),
        prompt="plain",
        max_length=32,
        partition=Natural("language"),
    )
    manifest = federate(settings, byte_level).manifest
    assert list(manifest.clients) == ["da", "en", "sv"]
    assert manifest.left_out() == [
        "10 examples left out: the answer does not fit in 32",
        "1 clients left out: fewer training examples than data.min_examples (1): de (0)",
    ]
    assert len(federate(replace(settings, truncate="prompt"), byte_level).shards) == 4
    assert len(federate(replace(settings, partition=Iid(), num_clients=2), byte_level).shards) == 2


def test_examples_are_told_apart_by_identity(byte_level: Any, base: DataSettings):
    first: Example = federate(base, byte_level).shards["client-000"].train[0]
    assert first == first  # tensors have no single truth value, so examples compare as objects
    assert first != replace(first)


def test_what_of_the_rows_is_not_learnt_is_in_the_manifest_and_its_lines(
    written: Callable[..., str], byte_level: Any, tmp_path: Path
):
    """Rows read = examples + rows told."""
    turn = {"role": "user", "content": "Hi"}
    answers: list[dict[str, Any]] = [{"weight": 0}, {"weight": 1}, {"weight": 1, "name": "Bob"}]
    talks = [
        {"messages": [turn, {"role": "assistant", "content": f"Hello {i}", **mark}], "id": i}
        for i, mark in enumerate(answers * 10)
    ]
    written("folder/a.jsonl", [*talks, {"messages": None}])
    written("folder/b.txt", "notes")
    settings = DataSettings(source=str(tmp_path / "folder"), prompt="plain", num_clients=2)
    manifest = federate(settings, byte_level).manifest
    held = sum(c.train + c.validation + c.test for c in manifest.clients.values())
    assert manifest.num_rows == 31 == held + manifest.losses.num_unlearnt + manifest.num_empty
    assert manifest.losses.read_as() == "messages (guessed from messages)"
    assert manifest.left_out() == [
        "1 rows without an answer, left out",
        "10 rows left out: none of their answers is to be learnt",
        "empty (null or NaN): messages (1 rows)",
        "not used: id (30 rows), messages[].name (10 rows)",
        "files not read: b.txt",
    ]
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))).left_out() == (
        manifest.left_out()
    )


def test_many_columns_are_told_in_part(written: Callable[..., str], byte_level: Any):
    wide = [{**row, **{f"c{n:02d}": "1" for n in range(30)}} for row in rows(20)]
    settings = DataSettings(source=written("a.jsonl", wide), prompt="plain", num_clients=2)
    (told,) = federate(settings, byte_level).manifest.left_out()
    assert told.endswith("c10 (20 rows), c11 (20 rows) and 18 more")
