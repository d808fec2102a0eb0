"""A rule within clusters: who is too few falls back, and says so."""

from typing import Any

import pytest
import torch

from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.fedavg import FedAvg
from fedloom.clustering.given import Given
from fedloom.clustering.sharing import update_clusters
from fedloom.core.protocols import Reply, Round
from fedloom.server.combine.chosen import Krum
from fedloom.server.combine.robust import TooFew

RULE = FedAvg(combine=Krum(1))
PUSH = {"big": 1.0, "small": -3.0}


def town(big: int, small: int) -> Round:
    sizes = {"big": big, "small": small}
    population = {f"{g}{at}": {"group": g} for g, n in sizes.items() for at in range(n)}
    return Round(1, 0, population, tuple(population), 1.0)


def played(round: Round, *, absent: tuple[str, ...] = (), state: Any = None) -> tuple[Any, Any]:
    """Return the state of two given clusters after a round, and what it tells."""
    algorithm = Clustered(RULE, Given("group"))
    state = state or algorithm.init({"w": torch.zeros(2)}, 0)
    replies = [
        Reply(c, {"delta": {"w": torch.full((2,), PUSH[p["group"]])}})
        for c, p in round.population.items()
        if c not in absent
    ]
    return algorithm.server_update(state, round, iter(replies))


def of(state: Any, group: str) -> float:
    member = f"{group}0"
    return float(state.cluster_states[state.grouping.assignment[member]].params["w"][0])


def test_clusters_large_enough_are_combined_each_by_itself() -> None:
    state, told = played(town(5, 5))
    assert (of(state, "big"), of(state, "small")) == (1, -3)
    assert "num_too_small" not in told
    assert set(told) >= {"influence/big0", "influence/small4"}


def test_a_cluster_that_can_never_be_enough_takes_the_model_for_all() -> None:
    state, told = played(town(6, 3))
    assert of(state, "big") == 1
    assert of(state, "small") == float(state.global_state.params["w"][0]) == 1, (
        "Krum's, of all nine"
    )
    assert told["num_too_small"] == 1


def test_a_cluster_that_lacks_replies_once_stays_where_it_was() -> None:
    state, _ = played(town(5, 5))
    after, told = played(town(5, 5), absent=("small1",), state=state)
    assert (of(after, "big"), of(after, "small")) == (2, -3)
    assert told["num_too_small"] == 1


def test_too_few_of_all_are_too_few() -> None:
    with pytest.raises(TooFew, match="krum needs at least 5 replies, got 4"):
        played(town(2, 2))


def test_replies_of_no_weight_stop_their_own_cluster_only() -> None:
    models = {0: RULE.init({"w": torch.zeros(1)}, 0), 1: RULE.init({"w": torch.zeros(1)}, 0)}
    plain = FedAvg()
    replies = [
        Reply("a", {"delta": {"w": torch.ones(1)}}),
        Reply("b", {"delta": {"w": torch.ones(1)}}, 0.0),
    ]
    round = Round(1, 0, {"a": {}, "b": {}}, ("a", "b"), 1.0)
    after, _ = update_clusters(plain, models, {"a": {0: 1.0}, "b": {1: 1.0}}, round, replies)
    assert float(after[0].params["w"]) == 1
    assert after[1] is models[1]


def test_what_the_server_sees_is_told_through_every_wrapper() -> None:
    assert Clustered(FedAvg()).server_sees == "each"
    assert Clustered(RULE).server_sees == "each in full"
