"""The language strategies of FedMLLM, for any label, any number of clients and any mixture."""

import re
from collections import Counter
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings
from fedloom.data.federation import federate
from fedloom.data.mixtures import Clusters, MultiDomain

FIVE = ("English", "Dutch", "Turkish", "Portuguese", "Spanish")
Labels = list[dict[str, str]]


def speaking(*counts: int) -> Labels:
    return [{"language": FIVE[at]} for at, count in enumerate(counts) for _ in range(count)]


def told(made: dict[str, list[int]], labels: Labels) -> list[Counter[str]]:
    return [Counter(labels[i]["language"] for i in indices) for indices in made.values()]


def test_clusters_give_each_client_one_language_and_equal_parts_of_it():
    """fedmllm 1.4: language_clusters, which needs a multiple of five clients and sorts by the list."""
    labels = speaking(40, 20, 20, 20, 20)
    made = Clusters("language").assign(labels, 10, 0)
    held = told(made, labels)
    assert [len(one) for one in held] == [1] * 10
    assert Counter(next(iter(one)) for one in held) == dict.fromkeys(FIVE, 2)
    assert {max(one.values()) for one in held} == {10, 20}


@pytest.mark.parametrize("clients", [3, 5, 7, 13])
def test_any_number_of_clients_gets_every_language(clients: int):
    """N is no multiple of L."""
    labels = speaking(30, 31, 32, 33, 34)
    held = told(Clusters("language").assign(labels, clients, 0), labels)
    assert sum(held, Counter()) == Counter(label["language"] for label in labels)
    assert max(len(one) for one in held) == max(1, -(-5 // clients))


def test_multi_domain_gives_each_group_half_of_its_language_and_half_of_the_next():
    """fedmllm 1.4: language_multi_domain, first half of language g, second half of language g + 1."""
    labels = speaking(40, 40, 40, 40, 40)
    kind = MultiDomain("language", order=FIVE)
    made = kind.assign(labels, 10, 0)
    for at, one in enumerate(told(made, labels)):
        group = at // 2
        assert one == {FIVE[group]: 10, FIVE[(group + 1) % 5]: 10}
    assert kind.groups(labels, 10)["client-000"] == "Dutch+English"
    assert kind.groups(labels, 10)["client-009"] == "English+Spanish"


def test_the_order_decides_who_is_next():
    labels = speaking(20, 20, 20)
    alphabetical = MultiDomain("language").groups(labels, 3)
    assert set(alphabetical.values()) == {"Dutch+English", "English+Turkish", "Dutch+Turkish"}
    backwards = MultiDomain("language", order=("Turkish", "English", "Dutch")).groups(labels, 3)
    assert backwards["client-000"] == "English+Turkish"
    with pytest.raises(
        ValueError,
        match=re.escape(
            "order must name each value of 'language' once (Dutch, English, Turkish), got Dutch"
        ),
    ):
        MultiDomain("language", order=("Dutch",)).assign(labels, 3, 0)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("sizes", [(100, 100, 100, 100, 100), (300, 40, 60, 50, 50)])
def test_a_share_of_every_client_is_of_its_own_language_and_the_rest_is_everybodys_mix(
    share: float, sizes: tuple[int, ...]
):
    labels = speaking(*sizes)
    kind = Clusters("language", share=share)
    made, groups = kind.assign(labels, 10, 0), kind.groups(labels, 10)
    for (client, indices), held in zip(made.items(), told(made, labels), strict=True):
        for value, size in zip(FIVE, sizes, strict=True):
            background = (1 - share) * size / sum(sizes)
            wanted = len(indices) * (background + share * (value == groups[client]))
            # Each language's parts are whole numbers.
            assert abs(held[value] - wanted) < 4


def test_the_share_of_several_domains_is_of_all_of_them():
    labels = speaking(200, 200, 200, 200, 200)
    held = told(
        MultiDomain("language", num_values=3, share=0.7, order=FIVE).assign(labels, 5, 0), labels
    )
    for group, one in enumerate(held):
        own = sum(one[FIVE[(group + at) % 5]] for at in range(3))
        assert own / one.total() == pytest.approx(0.7 + 0.3 * 3 / 5, abs=0.02)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Clusters("language", share=1.5),
            "data.partition.share must be in [0, 1], got 1.5",
        ),
        (
            lambda: MultiDomain("language", share=-1),
            "data.partition.share must be in [0, 1], got -1",
        ),
        (
            lambda: MultiDomain("language", num_values=1),
            "data.partition.num_values must be at least 2, got 1",
        ),
        (
            lambda: MultiDomain("language", num_values=4).assign(speaking(5, 5), 2, 0),
            "data.partition.num_values is 4, but the label 'language' has only 2 values",
        ),
    ],
)
def test_what_cannot_be_dealt_is_refused(make: Any, said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()


@pytest.mark.parametrize("partition", [Clusters("language", share=0.6), MultiDomain("language")])
def test_both_sides_know_the_group_of_a_client(partition: Any, tiny_tokenizer: Any):
    settings = DataSettings(
        num_examples=120,
        num_clients=4,
        partition=partition,
        where={"language": ["de", "en"], "task": ["opposite", "plural"]},
        max_length=192,
    )
    profiles = federate(settings, tiny_tokenizer).profiles
    assert all("language" not in profile for profile in profiles.values())
    wanted = ["de", "de", "en", "en"] if isinstance(partition, Clusters) else ["de+en"] * 4
    assert [profile["group"] for profile in profiles.values()] == wanted
