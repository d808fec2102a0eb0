"""Clusters by a label and by chance: what found ones are measured against."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch

from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.fedavg import FedAvg
from fedloom.clustering.given import Given, Random
from fedloom.clustering.sharing import Sharing
from fedloom.core.protocols import Reply, Round

SPEAKS = {"a": "en", "b": "de", "c": "en", "d": "de", "e": "sv"}
PUSHES = {"a": 1.0, "b": -1.0, "c": 3.0, "d": -3.0, "e": 10.0}


def population(clients: Iterable[str]) -> Mapping[str, Mapping[str, str]]:
    return {client: {"language": SPEAKS[client]} for client in sorted(clients)}


def play(
    algorithm: Clustered[Any],
    cohorts: Sequence[str],
    *,
    state: Any = None,
    first: int = 1,
    clients: str = "abcde",
) -> Any:
    """Run a round a cohort; each client moves by a push of its own."""
    state = state or algorithm.init({"w": torch.zeros(1, dtype=torch.float64)}, 0)
    for number, cohort in enumerate(cohorts, start=first):
        round = Round(number, number, population(clients), tuple(cohort), 1.0)
        replies = [
            Reply(client, {"delta": {"w": torch.full((1,), PUSHES[client]).double()}})
            for client in algorithm.broadcast(state, round)
        ]
        state, _ = algorithm.server_update(state, round, iter(replies))
    return state


def used(algorithm: Clustered[Any], state: Any, clients: str = "abcde") -> dict[str, float]:
    round = Round(99, 0, population(clients), tuple(clients), 1.0)
    sent = algorithm.broadcast(state, round)
    return {c: float(algorithm.deployed(sent[c], {})["w"]) for c in clients}


def test_a_label_makes_a_model_of_its_own_from_the_first_round():
    algorithm: Clustered[Any] = Clustered(FedAvg(), Given("language"), Sharing(pool="off"))
    state = play(algorithm, ["abcde", "abcde"])
    assert used(algorithm, state) == {"a": 4.0, "b": -4.0, "c": 4.0, "d": -4.0, "e": 20.0}
    assert list(state.grouping.changes) == [1]
    assert {len(m) for m in state.grouping.members.values()} == {2, 1}
    assert float(state.global_state.params["w"]) == pytest.approx(4.0)


def test_a_cluster_whose_clients_are_not_drawn_stands_still():
    algorithm: Clustered[Any] = Clustered(FedAvg(), Given("language"), Sharing(pool="off"))
    state = play(algorithm, ["abcde", "ac"])
    assert used(algorithm, state) == {"a": 4.0, "b": -2.0, "c": 4.0, "d": -2.0, "e": 10.0}


def test_who_comes_late_joins_those_of_its_label_or_begins_at_the_model_for_all():
    algorithm: Clustered[Any] = Clustered(FedAvg(), mode=Given("language"))
    state = play(algorithm, ["abc"], clients="abc")
    numbers = dict(state.grouping.assignment)
    whole = float(state.global_state.params["w"])
    state = play(algorithm, ["abcd"], state=state, first=2)
    assert {c: state.grouping.assignment[c] for c in numbers} == numbers
    assert state.grouping.assignment["d"] == numbers["b"]
    assert state.grouping.assignment["e"] == max(numbers.values()) + 1
    assert used(algorithm, state)["e"] == whole


def test_a_label_that_nobody_has_is_refused():
    algorithm: Clustered[Any] = Clustered(FedAvg(), mode=Given("dialect"))
    with pytest.raises(
        ValueError, match=r"mode\.given\.by must be in clients' profiles \(.*\), got 'dialect'"
    ):
        play(algorithm, ["abcde"])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_chance_makes_clusters_of_nearly_equal_size_that_stay(count: int):
    algorithm: Clustered[Any] = Clustered(FedAvg(), mode=Random(count, seed=3))
    state = play(algorithm, ["abcde", "abcde"])
    sizes = [len(members) for members in state.grouping.members.values()]
    assert len(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert list(state.grouping.changes) == [1]
    again = play(algorithm, ["abcde"])
    assert again.grouping.assignment == state.grouping.assignment


def test_another_seed_draws_others_and_latecomers_fill_up():
    draws = {
        tuple(
            play(Clustered(FedAvg(), mode=Random(2, seed=s)), ["abcde"]).grouping.assignment.items()
        )
        for s in range(6)
    }
    assert len(draws) > 1
    algorithm: Clustered[Any] = Clustered(FedAvg(), mode=Random(2))
    state = play(algorithm, ["abc"], clients="abc")
    old = dict(state.grouping.assignment)
    state = play(algorithm, ["abcde"], state=state, first=2)
    assert {c: state.grouping.assignment[c] for c in old} == old
    assert sorted(len(m) for m in state.grouping.members.values()) == [2, 3]


def test_no_clusters_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"mode\.random\.num_clusters must be at least 1, got 0"):
        Random(0)
