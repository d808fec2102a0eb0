"""What a client's word can do to a round: its weight, its update, its evaluation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.private import Private
from fedloom.core.protocols import ClientFailure, Delivery, Profile, Reply, Task
from fedloom.recipe import build_recipe
from fedloom.rounds.loop import Run, advance, begin
from fedloom.rounds.plausibility import Plausibility, implausible_evaluation
from fedloom.server.combine.chosen import Krum
from fedloom.server.optimizers import SGD, Adam
from fedloom.server.samplers import Full

HONEST = torch.tensor([0.1, -0.2, 0.3])


@dataclass
class Town:
    """Seven clients with ten examples each, who say what they are told to."""

    says: Mapping[str, Any] = field(default_factory=dict)
    """Client -> weight, or its whole delta."""
    profile: Profile = field(default_factory=lambda: {"num_examples": "10"})

    def population(self) -> Mapping[str, Profile]:
        return {f"c{at}": self.profile for at in range(7)}

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        for task in tasks:
            said = self.says.get(task.client, 10)
            delta = said if isinstance(said, torch.Tensor) else HONEST
            weight = 10 if isinstance(said, torch.Tensor) else said
            yield Delivery(Reply(task.client, {"delta": {"w": delta}}, weight))


def advanced(
    town: Town, algorithm: Any = None, run: Run[Any] | None = None, **more: Any
) -> tuple[Run[Any], Any, list[ClientFailure], list[str]]:
    algorithm = algorithm or FedAvg()
    run = run or begin(algorithm, {"w": torch.ones(3)}, 0)
    said: list[str] = []
    run, metrics, failures = advance(
        run,
        algorithm,
        town,
        population=town.population(),
        sampler=Full(),
        say=said.append,
        **{"max_update_norm": 1e4, **more},
    )
    return run, metrics, list(failures), said


WRONG: list[Any] = [-38, -1e-9, 11, 1e300, 10**400, math.nan, math.inf, True, False, None, "9", [1]]


@pytest.mark.parametrize("weight", WRONG, ids=lambda weight: ascii(weight)[:12])
def test_a_weight_nobody_agreed_to_is_its_clients_absence(weight: Any) -> None:
    run, metrics, failures, _ = advanced(Town({"c2": weight}))
    (failure,) = failures
    assert failure.client == "c2"
    assert failure.reason.startswith("its weight must be a number from 0 to the 10 examples")
    assert len(failure.reason) < 140
    assert metrics["comm/num_replies"] == 6
    assert metrics["comm/num_absent"] == 1
    assert metrics["comm/round_kept"] == 1
    assert torch.allclose(run.state.params["w"], 1 + HONEST)


@pytest.mark.parametrize("weight", [0, 0.0, 1, 9.5, 10, 10.0])
def test_a_weight_within_what_was_declared_counts(weight: float) -> None:
    _, metrics, failures, _ = advanced(Town({"c2": weight}))
    assert not failures
    assert metrics["comm/num_replies"] == 7


@pytest.mark.parametrize("weight", [-1, 1e300, 10**400, True, math.nan])
def test_without_a_declared_count_a_weight_is_a_number_all_the_same(weight: Any) -> None:
    for profile in (
        {},
        {"num_examples": "many"},
        {"num_examples": "9" * 400},
        {"num_examples": "-5"},
    ):
        _, _, failures, _ = advanced(Town({"c2": weight}, profile))
        assert [a.client for a in failures] == ["c2"]


def test_nobody_weighs_more_than_a_thousand_times_the_median_client() -> None:
    profiles = {f"c{at}": {"num_examples": "10"} for at in range(6)} | {
        "big": {"num_examples": "10000000"}
    }
    plausibility = Plausibility(profiles, None)
    given = Reply("big", {"delta": {"w": HONEST}}, 10_000_000)
    heard = plausibility.of(given)
    assert isinstance(heard, Reply)
    assert heard.weight == 10_000
    assert plausibility.of(Reply("c1", {"delta": {"w": HONEST}}, 10)).weight == 10  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [1e30, -1e30, 3e38, 1e5])
@pytest.mark.parametrize("optimizer", [SGD(), Adam(0.1)], ids=["sgd", "adam"])
def test_an_update_out_of_all_proportion_is_its_clients_absence(
    size: float, optimizer: Any
) -> None:
    algorithm = FedAvg(optimizer)
    town, run = Town({"c3": torch.full((3,), size)}), None
    for _ in range(3):
        run, metrics, failures, said = advanced(town, algorithm, run)
        assert [a.client for a in failures] == ["c3"]
        assert "above run.max_update_norm (10000)" in failures[0].reason
        assert metrics["comm/round_kept"] == 1
        assert not said
    assert float((run.state.params["w"] - 1).abs().max()) < 1  # type: ignore[union-attr]


def test_below_the_bound_everything_counts() -> None:
    run, _, failures, _ = advanced(Town({"c3": torch.full((3,), 1e3)}))
    assert not failures
    assert float(run.state.params["w"].max()) > 100


def test_a_model_that_jumped_is_not_kept_and_the_likely_client_is_named() -> None:
    town = Town({"c5": torch.full((3,), 1e3)})
    run, metrics, _, said = advanced(town, FedAvg(SGD(1e6)))
    assert metrics["comm/round_kept"] == 0
    assert torch.equal(run.state.params["w"], torch.ones(3))
    assert run.number == 1
    assert said == [
        "the model stays as it was: the model moved by 2.48e+08, above run.max_update_norm (10000);"
        " most of it came from c5"
    ]
    assert not any(name.startswith("server/") for name in metrics)
    run, metrics, _, _ = advanced(Town(), FedAvg(SGD(1e3)), run)
    assert metrics["comm/round_kept"] == 1, "what follows goes on from the last good state"


def test_a_state_that_is_not_finite_is_not_kept_whatever_the_bound() -> None:
    town = Town({"c1": torch.full((3,), 3e38), "c2": torch.full((3,), 3e38)})
    run, metrics, _, said = advanced(town, FedAvg(SGD(1e6)), max_update_norm=math.inf)
    assert metrics["comm/round_kept"] == 0
    assert torch.equal(run.state.params["w"], torch.ones(3))
    assert "the new state is not finite; most of it came from c1, c2" in said[0]
    # Adam's second moment alone overflows: the model would stand still for ever.
    town = Town({"c1": torch.full((3,), 1e30)})
    run, metrics, _, said = advanced(town, FedAvg(Adam(0.1)), max_update_norm=math.inf)
    assert metrics["comm/round_kept"] == 0


def test_a_rule_that_compares_uploads_sees_those_it_counts_on() -> None:
    town = Town({"c0": torch.full((3,), 1e30), "c6": torch.full((3,), -1e30)})
    run, metrics, failures, said = advanced(town, FedAvg(combine=Krum(2)))
    assert not failures
    assert not said
    assert metrics["comm/round_kept"] == 1
    assert torch.allclose(run.state.params["w"], 1 + HONEST)
    assert metrics["server/influence/c0"] == 0 == metrics["server/influence/c6"]


def test_too_few_for_a_rule_leave_the_model_as_it_was_and_say_so() -> None:
    town = Town({"c0": -1, "c1": True})
    run, metrics, _, said = advanced(town, FedAvg(combine=Krum(2)))
    assert metrics["comm/round_kept"] == 0
    assert said == ["the model stays as it was: krum needs at least 7 replies, got 5"]
    assert torch.equal(run.state.params["w"], torch.ones(3))
    _, _, _, said = advanced(Town(), min_replies=8)
    assert said == ["the model stays as it was: 7 clients replied, run.min_replies is 8"]


def test_around_a_clip_no_norm_is_refused() -> None:
    algorithm = Private(FedAvg(), 1.0, noise_multiplier=0.0, noise_seed=1)
    town = Town({f"c{at}": torch.full((3,), 1e6) if at == 2 else 1.0 for at in range(7)})
    _, metrics, failures, said = advanced(town, algorithm, max_update_norm=1e-9)
    assert not failures
    assert not said
    assert metrics["comm/round_kept"] == 1


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"num_examples": 5.0, "num_tokens": 90.0}, None),
        ({"num_examples": 3.0, "num_tokens": 3.0}, None),
        ({"num_examples": 6.0, "num_tokens": 90.0}, "measured on 6 examples, but declared 5"),
        ({"num_examples": 1e300, "num_tokens": 1.0}, "measured on 1e\\+300 examples"),
        ({"num_examples": -1.0, "num_tokens": 1.0}, "measured on -1 examples"),
        ({"num_examples": math.nan, "num_tokens": 1.0}, "measured on nan examples"),
        (
            {"num_examples": 5.0, "num_tokens": 1e9},
            "1e\\+09 tokens, but 5 examples hold at most 100",
        ),
        ({"num_examples": 5.0, "num_tokens": -4.0}, "measured on -4 tokens"),
        ({"num_examples": 5.0, "num_tokens": math.nan}, "measured on nan tokens"),
    ],
)
def test_an_evaluation_weighs_no_more_than_was_declared(
    metrics: Mapping[str, float], said: str | None
) -> None:
    doubt = implausible_evaluation(metrics, held_out=5, usual=4, most_tokens=20)
    if said is None:
        assert doubt is None
    else:
        with pytest.raises(ValueError, match=said):
            raise ValueError(doubt)


def test_an_evaluation_weighs_no_more_than_a_thousand_times_the_median_clients() -> None:
    loud = {"num_examples": 1e9, "num_tokens": 1e9}
    assert implausible_evaluation(loud, held_out=10**9, usual=10**9, most_tokens=20) is None
    doubt = implausible_evaluation(loud, held_out=10**9, usual=20, most_tokens=20)
    assert doubt == "it would weigh 1e+09 examples, more than 1000 times the median client's"


def test_of_a_pair_both_answers_are_measured() -> None:
    tree = {"name": "pairs", "data": {"max_length": 64}, "objective": "dpo"}
    assert build_recipe(tree).most_tokens == 128
    assert build_recipe({**tree, "objective": "sft"}).most_tokens == 64
