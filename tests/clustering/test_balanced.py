"""Clusters of one size by validation loss: who is dealt where, when, and what is refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fedloom
from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.fedavg import FedAvg
from fedloom.clustering.balanced import Balanced, dealt
from fedloom.clustering.sharing import Sharing
from fedloom.core.protocols import ClientError, Done, Evaluate, Fit, Reply, Round, Task
from fedloom.core.wrapper import Wrapper
from fedloom.recipe import RecipeError, build_recipe

TASTES = {"a": 1.0, "b": -1.0, "c": 1.0, "d": -1.0}
"""Where each client would have the only parameter."""


def report(*losses: float, num_examples: int = 4) -> dict[str, torch.Tensor]:
    return {
        "loss": torch.tensor(losses, dtype=torch.float64),
        "num_examples": torch.tensor(float(num_examples)),
    }


def population() -> Mapping[str, Mapping[str, str]]:
    return {client: {} for client in TASTES}


def play(
    algorithm: Clustered[Any],
    first: int,
    last: int,
    state: Any = None,
    *,
    cohort: Sequence[str] = tuple(TASTES),
    unmeasured: Sequence[str] = (),
) -> tuple[Any, dict[int, dict[str, list[float]]]]:
    """Run rounds of clients that move half of the way to their taste; return what each measured and trained too."""
    state = state or algorithm.init({"w": torch.zeros(1, dtype=torch.float64)}, 0)
    seen: dict[int, dict[str, list[float]]] = {}
    for number in range(first, last + 1):
        round = Round(number, number, population(), tuple(cohort), len(cohort) / len(TASTES))
        replies = []
        seen[number] = {}
        for client, download in algorithm.broadcast(state, round).items():
            task = Task("train", number, client, 0, {}, download)
            half = algorithm.client_update(task, {})
            work, worked = next(half), list[float]()
            reply: Reply | None = None
            while reply is None:
                try:
                    work = answer(half, work, client, worked, unmeasured)
                except StopIteration as stop:
                    reply = stop.value[0]
            seen[number][client] = worked
            replies.append(reply)
        state, _ = algorithm.server_update(state, round, iter(replies))
    return state, seen


def answer(
    half: Any, work: Any, client: str, worked: list[float], unmeasured: Sequence[str]
) -> Any:
    if isinstance(work, Evaluate):
        if client in unmeasured:
            return half.throw(ClientError(f"{client} has no validation examples"))
        loss = abs(float(work.params["w"]) - TASTES[client])
        return half.send(Done({}, 3, metrics={"loss": loss}))
    assert isinstance(work, Fit)
    worked.append(float(work.start["w"]))
    moved = {"w": work.start["w"] + (TASTES[client] - work.start["w"]) / 2}
    return half.send(Done(moved, 3, 1))


def used(algorithm: Clustered[Any], state: Any, number: int = 99) -> dict[str, float]:
    round = Round(number, 0, population(), tuple(TASTES), 1.0)
    sent = algorithm.broadcast(state, round)
    return {c: float(algorithm.deployed(sent[c], {})["w"]) for c in TASTES}


def biscuit(every: int = 0, warm_up: int = 1) -> Clustered[Any]:
    return Clustered(FedAvg(weighting="uniform"), Balanced(2, warm_up, every))


def test_the_sum_of_the_losses_is_the_least_and_sizes_differ_by_one_at_most() -> None:
    """All like the first model best, d and e lose least by the second: 0.1 + 0.2, and no other two less."""
    reports = {
        "a": report(0.0, 0.9),
        "b": report(0.0, 0.5),
        "c": report(1.0, 1.4),
        "d": report(2.0, 2.1),
        "e": report(0.3, 0.5),
    }
    assert dealt(reports, {}, 2) == {"a": 0, "b": 0, "c": 0, "d": 1, "e": 1}
    for count in range(2, 9):
        some = {f"c{i}": report(0.0, 1.0, 2.0) for i in range(count)}
        sizes = [list(dealt(some, {}, 3).values()).count(k) for k in range(3)]
        assert max(sizes) - min(sizes) <= 1


def test_of_equal_sums_clients_stay_where_they_were_whatever_their_order() -> None:
    alike = {client: report(1.0, 1.0) for client in "abcd"}
    assert dealt(alike, {}, 2) == {"a": 0, "b": 0, "c": 1, "d": 1}
    before = {"a": 1, "b": 0, "c": 1, "d": 0}
    assert dealt(alike, before, 2) == before
    assert dealt(dict(reversed(alike.items())), before, 2) == before


def test_one_client_with_an_absurd_loss_does_not_decide_for_all() -> None:
    reports = {"a": report(0.0, 1e300), "b": report(0.0, 1.0), "c": report(1.0, 0.0)}
    reports["d"] = report(1.0, 0.0)
    assert dealt(reports, {}, 2) == {"a": 0, "b": 0, "c": 1, "d": 1}


def test_who_measured_nothing_goes_where_there_is_room() -> None:
    reports = {"a": report(0.0, 1.0), "b": report(0.0, 0.0, num_examples=0), "c": report(0.0, 1.0)}
    reports["d"] = report(0.2, 0.0)
    assert dealt(reports, {"b": 0}, 2) == {"a": 0, "b": 1, "c": 0, "d": 1}


def test_models_warm_up_in_turns_and_clients_of_one_taste_come_together() -> None:
    """Warm-up of one taste alone leads each model its way: a and c are drawn in round 1, b and d in round 2."""
    algorithm = biscuit()
    state, _ = play(algorithm, 1, 1, cohort="ac")
    state, seen = play(algorithm, 2, 2, state, cohort="bd")
    assert seen[2] == {"b": [0.0], "d": [0.0]}  # its own beginning, not where the first model is
    assert float(state.cluster_states[0].params["w"]) == 0.5
    assert float(state.cluster_states[1].params["w"]) == -0.5
    state, seen = play(algorithm, 3, 3, state, cohort="a")
    # Everybody is asked, and trains what it loses least by.
    assert seen[3] == {"a": [0.5], "b": [-0.5], "c": [0.5], "d": [-0.5]}
    assert state.grouping.assignment == {"a": 0, "b": 1, "c": 0, "d": 1}
    assert used(algorithm, state) == {"a": 0.75, "b": -0.75, "c": 0.75, "d": -0.75}
    state, seen = play(algorithm, 4, 4, state, cohort="ab")
    assert seen[4] == {"a": [0.75], "b": [-0.75]}


def test_clients_are_grouped_again_every_so_many_rounds() -> None:
    algorithm = biscuit(every=2)
    state, _ = play(algorithm, 1, 7)
    asked = [n for n in range(1, 8) if "model-0:params" in _download(algorithm, state, n)]
    assert asked == [3, 5, 7]
    assert sorted(map(len, state.grouping.members.values())) == [2, 2]


def _download(algorithm: Clustered[Any], state: Any, number: int) -> Any:
    round = Round(number, 0, population(), ("a",), 0.25)
    return algorithm.broadcast(state, round)["a"]


def test_a_client_without_validation_data_trains_its_own_model_and_is_grouped_all_the_same() -> (
    None
):
    algorithm = biscuit()
    state, _ = play(algorithm, 1, 1, cohort="ac")
    state, _ = play(algorithm, 2, 2, state, cohort="bd")
    state, seen = play(algorithm, 3, 3, state, unmeasured="c")
    assert seen[3]["c"] == [-0.5]  # of no cluster yet, it goes on from what was trained last
    assert state.grouping.assignment == {"a": 0, "b": 1, "c": 0, "d": 1}


def test_whoever_was_never_grouped_uses_the_model_for_all() -> None:
    algorithm = biscuit()
    state, _ = play(algorithm, 1, 4)
    round = Round(5, 0, {**population(), "new": {}}, ("new",), 0.2)
    sent = algorithm.broadcast(state, round)["new"]
    assert torch.equal(sent["params"]["w"], state.global_state.params["w"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_clusters": 1}, "num_clusters must be at least 2, got 1"),
        ({"warm_up": 0}, "warm_up must be at least 1, got 0"),
        ({"every": -1}, "every must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Balanced(**{"num_clusters": 2, **settings})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": {"rounds": 2}}, "run.rounds must be at least 3, as clustered.mode.balanced groups"),
        ({"data": {"fractions": [0.9, 0.0, 0.1]}}, "leaves no validation data: give the second"),
        (
            {"algorithm": [{"flasc": {}}, {"clustered": {"mode": {"balanced": {"num_clusters": 2}}}}, "fedavg"]},
            "put clustered first, got flasc\\(clustered\\(fedavg\\)\\)",
        ),
        (
            {"algorithm": [{"partial_pooling": {}}, {"clustered": {"mode": {"balanced": {"num_clusters": 2}}}}, "fedavg"]},
            "not for clustered.mode balanced, in which clients are sent all models",
        ),
    ],
)  # fmt: skip
def test_a_recipe_in_which_nobody_could_be_grouped_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    algorithm = [{"clustered": {"mode": {"balanced": {"num_clusters": 2}}}}, "fedavg"]
    with pytest.raises(RecipeError, match=said):
        build_recipe({"name": "x", "algorithm": algorithm, "run": {"rounds": 3}, **changes})


def test_more_clusters_than_clients_are_refused(tmp_path: Path) -> None:
    algorithm = [{"clustered": {"mode": {"balanced": {"num_clusters": 5}}}}, "fedavg"]
    tree = {
        "name": "x",
        "algorithm": algorithm,
        "data": {"num_examples": 40, "num_clients": 4},
        "run": {"rounds": 9},
    }
    with pytest.raises(ValueError, match="num_clusters must be at most the 4 clients there are"):
        fedloom.run(build_recipe(tree), tmp_path)


def test_shares_and_pools_are_of_other_modes() -> None:
    with pytest.raises(ValueError, match="in mode auto only"):
        Clustered(FedAvg(), Balanced(2), Sharing(mix=0.1))
    with pytest.raises(
        ValueError, match="not for mode paper or balanced, whose clusters take plain"
    ):
        Clustered(FedAvg(), Balanced(2), Sharing(pool="on"))
    assert isinstance(biscuit(), Wrapper)
    assert not biscuit().pools
