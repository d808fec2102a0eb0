"""Who holds what: disjoint, complete, the same on every machine."""

import hashlib
import json
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.data.mixtures import Clusters, MultiDomain
from fedloom.data.names import client_names, fingerprint, safe_names
from fedloom.data.partition import (
    PARTITIONS,
    Dirichlet,
    Iid,
    Natural,
    Partition,
    Quantity,
    Shards,
    stratum,
)
from fedloom.data.sharding import apportion, shuffled
from fedloom.data.splits import cut

Labels = list[dict[str, str]]
KINDS: list[Partition] = [
    Iid(),
    Dirichlet("task", alpha=1.0, min_examples=1),
    Shards("task", per_client=2),
    Quantity(min_examples=1),
    Quantity(sigma=1.5, min_examples=1),
    Natural("task"),
    Clusters("task"),
    Clusters("task", share=0.6),
    MultiDomain("task"),
]


# Of some(200) over 5 clients with seed 7, in the order of KINDS.
GOLDEN = [
    "8ca4d75c026a",
    "55845030da2a",
    "2b542e22dd70",
    "a42ecfb42393",
    "d3468c828fb9",
    "88575404a949",
    "b49bd39bcdaa",
    "c7f636aebdad",
    "fc17f0be3c8a",
]


def some(count: int, kinds: int = 4) -> Labels:
    return [{"task": f"t{i * i % kinds}", "language": "en"} for i in range(count)]


def test_the_table_names_every_kind():
    assert set(PARTITIONS.values()) == {type(kind) for kind in KINDS}
    assert [stratum(kind) for kind in KINDS[:6]] == [None, "task", "task", None, None, "task"]
    assert {stratum(kind) for kind in KINDS[6:]} == {"task"}


# --- every kind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_example_has_one_client_and_no_client_is_empty(kind: Partition, data: st.DataObject):
    """Sizes sum, disjoint, complete; N is no multiple of anything."""
    # A few of each, so that every group of clients has enough.
    tasks = [*"abcdef" * 4, *data.draw(st.lists(st.sampled_from("abcdef"), max_size=90))]
    labels = [{"task": task} for task in tasks]
    count = None if isinstance(kind, Natural) else data.draw(st.integers(1, 7))
    made = kind.assign(labels, count, data.draw(st.integers(0, 99)))
    assert sorted(i for indices in made.values() for i in indices) == list(range(len(labels)))
    assert all(indices == sorted(indices) and indices for indices in made.values())
    assert len(made) == (len(set(tasks)) if count is None else count)
    assert list(made) == sorted(made)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_seed_gives_one_assignment(kind: Partition):
    """A seed-stable hash."""
    count = None if isinstance(kind, Natural) else 5
    labels = some(200)
    assert kind.assign(labels, count, 1) == kind.assign(labels, count, 1)
    if not isinstance(kind, Natural):
        assert kind.assign(labels, count, 1) != kind.assign(labels, count, 2)


def test_the_assignments_are_these_on_every_machine():
    """Same seed, same split, on any machine."""
    made = [kind.assign(some(200), None if isinstance(kind, Natural) else 5, 7) for kind in KINDS]
    digests = [hashlib.sha256(json.dumps(one).encode()).hexdigest()[:12] for one in made]
    assert digests == GOLDEN


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not isinstance(kind, Natural)], ids=str)
def test_more_clients_than_examples_is_an_error(kind: Any):
    with pytest.raises(
        ValueError,
        match=r"data\.num_clients is 11 with at least [12] examples each, but there are only 8",
    ):
        kind.assign(some(8), 11, 0)


@pytest.mark.parametrize(
    "kind", [Dirichlet("topic"), Shards("topic"), Natural("topic"), Clusters("topic")], ids=str
)
def test_an_unknown_label_names_the_known_ones(kind: Any):
    message = "data.partition.by must be a label of the data (language, task), got 'topic'; data.labels names the columns kept"
    with pytest.raises(ValueError, match=re.escape(message)):
        kind.assign(some(40), 2, 0)


# --- each kind -----------------------------------------------------------------------------------


def test_iid_parts_are_equal():
    sizes = [len(indices) for indices in Iid().assign(some(103), None, 0).values()]
    assert sorted(sizes) == [10] * 7 + [11] * 3


def spread(alpha: float) -> float:
    """Return the mean share of a client's most frequent label."""
    labels = some(2000)
    made = Dirichlet("task", alpha=alpha, min_examples=1).assign(labels, 10, 0)
    tops = [
        Counter(labels[i]["task"] for i in indices).most_common(1)[0][1] / len(indices)
        for indices in made.values()
    ]
    return sum(tops) / len(tops)


def test_dirichlet_goes_from_one_label_a_client_to_iid():
    base = max(Counter(label["task"] for label in some(2000)).values()) / 2000
    assert spread(1e6) == pytest.approx(base, abs=0.02)
    assert base < spread(1.0) < spread(0.1) <= 1.0


def test_a_tiny_alpha_does_not_underflow():
    made = Dirichlet("task", alpha=1e-4, min_examples=1).assign(
        [{"task": str(i)} for i in range(400)], 3, 0
    )
    assert sum(map(len, made.values())) == 400


def test_dirichlet_that_leaves_a_client_short_says_which_and_what_to_change():
    message = (
        r"data\.partition leaves client-\d{3} with \d of at least 30 examples in the best of 200 draws: raise "
        r"data\.partition\.alpha \(0\.01\) or data\.num_examples, or lower data\.num_clients \(6\) or data\.partition\.min_examples"
    )
    with pytest.raises(ValueError, match=message):
        Dirichlet("task", alpha=0.01, min_examples=30).assign(some(200), 6, 0)


def test_dirichlet_draws_again_until_everybody_has_enough():
    made = Dirichlet("task", alpha=0.3, min_examples=8).assign(some(300), 8, 0)
    assert min(map(len, made.values())) >= 8


def test_a_client_sees_about_as_many_labels_as_it_has_shards():
    labels = [{"task": f"t{i % 10}"} for i in range(1000)]
    made = Shards("task", per_client=2).assign(labels, 10, 0)
    assert {len(indices) for indices in made.values()} == {100}
    assert max(len({labels[i]["task"] for i in indices}) for indices in made.values()) <= 4
    assert len(Shards("task", per_client=1).assign(labels, 10, 0)) == 10


def test_quantity_is_skewed_in_size_and_nobody_goes_short():
    for kind in (Quantity(alpha=0.3), Quantity(sigma=1.5)):
        sizes = [len(indices) for indices in kind.assign(some(1000), 10, 0).values()]
        assert min(sizes) >= 3
        assert max(sizes) > 3 * sorted(sizes)[5]
    assert {len(indices) for indices in Quantity(sigma=0.0).assign(some(1000), 10, 0).values()} == {
        100
    }


def test_natural_makes_a_client_of_every_value():
    """Meta, one category a client."""
    labels = [{"file": name} for name in ("xquad.de", "xquad.ar", "xquad.de")]
    assert Natural("file").assign(labels, None, 0) == {"xquad.ar": [1], "xquad.de": [0, 2]}


def test_natural_with_fewer_clients_than_values_keeps_the_largest():
    """Clients < categories and clients > categories are both defined."""
    labels = [{"author": author} for author in "abbccc"]
    assert Natural("author", 2).assign(labels, None, 0) == {"b": [1, 2], "c": [3, 4, 5]}
    message = (
        "data.partition.natural.largest is 4, but the label 'author' has only 3 values: "
        "lower it, or leave it out to take them all"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Natural("author", 4).assign(labels, None, 0)
    with pytest.raises(ValueError, match=r"natural\.largest must be at least 1, got 0"):
        Natural("author", 0)


# --- names and numbers ---------------------------------------------------------------------------


def test_names_are_safe_for_every_file_system_and_distinct():
    names = safe_names(["a/b", "a b", "A-B", "../..", "Türkçe", "中文", "x" * 80, "ok_1.2"])
    assert list(names.values()) == [
        "a-b",
        "a-b-2",
        "A-B-3",
        "client",
        "Türkçe",
        "中文",
        "x" * 80,
        "ok_1.2",
    ]
    assert safe_names(["../../etc/passwd"])["../../etc/passwd"] == "etc-passwd"
    composed, apart = "\u00e9cole", "e\u0301cole"
    assert len({name.casefold() for name in safe_names([composed, apart]).values()}) == 2


@pytest.mark.parametrize(
    "value",
    [
        "Patient number 3 was admitted with a fever of 39 degrees",
        "was seen at noon by us",
        "x" * 81,
        "患者因发烧三十九度入院治疗患者因发烧三十九度入院治疗",
        "con",
        "NUL.txt",
        "lost \ud800" * 9,
    ],
)
def test_what_is_no_name_gives_a_hash_of_itself(value: str):
    (name,) = safe_names([value]).values()
    assert name == f"client-{fingerprint(value)}"
    assert re.fullmatch(r"client-[0-9a-f]{12}", name)


@given(st.lists(st.text(max_size=120), unique=True, max_size=12))
def test_any_values_give_distinct_names_of_letters_and_digits(values: list[str]):
    names = safe_names(values)
    assert list(names) == values
    assert len({name.casefold() for name in names.values()}) == len(values)
    for name in names.values():
        assert re.fullmatch(r"[\w.-]+", name)
        assert len(name.encode()) <= 200
        assert not name.startswith((".", "-"))


def test_names_sort_as_they_count():
    assert client_names(2) == ["client-000", "client-001"]
    assert client_names(1001)[-1] == "client-1000"
    assert sorted(client_names(1001)) == client_names(1001)


@given(st.integers(0, 500), st.lists(st.floats(0.01, 10), min_size=1, max_size=9))
def test_apportioned_parts_sum_and_are_within_one_of_their_share(total: int, weights: list[float]):
    parts = apportion(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1 + 1e-9


def test_a_shuffle_is_a_permutation_that_the_seed_decides():
    assert sorted(shuffled(range(50), 1)) == list(range(50))
    assert shuffled(range(50), 1) == shuffled(range(50), 1) != shuffled(range(50), 2)


# --- cutting one client --------------------------------------------------------------------------

FRACTIONS = (0.8, 0.1, 0.1)


@given(st.integers(1, 200), st.integers(0, 99))
@settings(deadline=None)
def test_a_cut_is_disjoint_complete_and_sized_as_asked(count: int, seed: int):
    parts = cut(range(count), some(count), by="task", fractions=FRACTIONS, seed=seed)
    assert sorted(parts.all) == list(range(count))
    for part, share in zip((parts.train, parts.validation, parts.test), FRACTIONS, strict=True):
        assert abs(len(part) - share * count) < 2
    assert parts.train
    if count >= 3:
        assert parts.validation
        assert parts.test


@pytest.mark.parametrize("seed", range(20))
def test_every_label_is_cut_in_the_same_shares(seed: int):
    """FederatedScope's test split of a client had other labels than its training split."""
    labels = some(400, kinds=3)
    parts = cut(range(400), labels, by="task", fractions=(0.7, 0.2, 0.1), seed=seed)
    whole = Counter(label["task"] for label in labels)
    for part, share in ((parts.train, 0.7), (parts.validation, 0.2), (parts.test, 0.1)):
        held = Counter(labels[i]["task"] for i in part)
        assert all(abs(held[task] - share * whole[task]) <= 2 for task in whole)


def test_a_share_of_zero_gets_nothing():
    parts = cut(range(10), some(10), by=None, fractions=(0.8, 0.0, 0.2), seed=0)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (8, 0, 2)
    assert len(cut(range(10), some(10), by=None, fractions=(1.0, 0.0, 0.0), seed=0).train) == 10


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(0, (0, 0, 0)), (1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (4, (2, 1, 1))],
)
def test_the_smallest_clients_train_first(count: int, sizes: tuple[int, int, int]):
    parts = cut(range(count), some(count), by="task", fractions=FRACTIONS, seed=3)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == sizes


def test_which_label_is_held_out_is_not_decided_by_its_name():
    labels = [{"task": "a"}, {"task": "b"}, {"task": "c"}]
    held = {
        labels[cut(range(3), labels, by="task", fractions=FRACTIONS, seed=s).test[0]]["task"]
        for s in range(30)
    }
    assert held == {"a", "b", "c"}
