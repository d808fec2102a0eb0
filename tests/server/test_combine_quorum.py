import dataclasses
from typing import Any

import pytest

from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.pfedme import PFedMe
from fedloom.core.description import check, describe
from fedloom.core.protocols import Algorithm
from fedloom.recipe import RecipeError, build_recipe
from fedloom.server.combine.chosen import Bulyan, Krum
from fedloom.server.samplers import Fixed, Full, Poisson, Sampler, Uniform, Weighted

RECIPE = build_recipe({"name": "r"})
NAMES = tuple(f"c{at}" for at in range(6))


def ask(algorithm: Algorithm[Any], cohort: Sampler, num_clients: int | None) -> None:
    recipe = dataclasses.replace(RECIPE, cohort=cohort)
    assert check(algorithm, recipe, num_clients=num_clients) is algorithm


@pytest.mark.parametrize(
    ("cohort", "num_clients", "most"),
    [
        (Uniform(6), None, 6),
        (Uniform(6), 100, 6),
        (Weighted(6), None, 6),
        (Fixed(NAMES), 100, 6),
        (Full(), 6, 6),
        (Poisson(0.1), 6, 6),
        (Full(), None, None),
        (Poisson(0.1), None, None),
        (Poisson(0.1), 100, 100),
    ],
)
def test_a_rule_needs_as_many_as_its_largest_cohort_may_bring(
    cohort: Sampler, num_clients: int | None, most: int | None
) -> None:
    for algorithm in (
        FedAvg(combine=Krum(2)),
        Ditto(FedAvg(combine=Krum(2))),
        Clustered(FedAvg(combine=Krum(2))),
        PFedMe(combine=Krum(2)),
    ):
        if most == 6:
            with pytest.raises(ValueError, match=r"krum needs at least 7 .* cohort of at most 6"):
                ask(algorithm, cohort, num_clients)
        else:
            ask(algorithm, cohort, num_clients)
    ask(FedAvg(combine=Krum(1)), cohort, num_clients)
    ask(FedAvg(), cohort, num_clients)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"cohort": {"uniform": {"size": 6}}}, "krum needs at least 7 .* at most 6: ask more"),
        ({"data": {"num_clients": 6}}, "at most 6"),
        ({"data": {"num_clients": 7}}, None),
        ({"algorithm": ["flasc", "fedavg"]}, None),
        ({"algorithm": ["flasc", {"fedavg": {"combine": "median"}}]}, "flasc.upload gives every"),
        (
            {
                "algorithm": [
                    {"flasc": {"upload": 1.0, "download": 0.5}},
                    {"fedavg": {"combine": "median"}},
                ]
            },
            None,
        ),
        (
            {
                "algorithm": [
                    {"flasc": {"upload": {"start": 1.0, "tiers": {"phone": 0.5}}}},
                    "clustered",
                    {"fedavg": {"combine": "geometric_median"}},
                ]
            },
            "flasc.upload gives every client a mask of its own",
        ),
        (
            {
                "algorithm": [
                    {"prune": {"regrow": True, "density": {"tiers": {"phone": 0.5}}}},
                    {"ditto": {}},
                    {"fedavg": {"combine": "median"}},
                ]
            },
            "prune.density gives every client a mask of its own",
        ),
        ({"algorithm": ["prune", {"fedavg": {"combine": "median"}}]}, None),
        (
            {
                "cohort": {"poisson": {"q": 0.5}},
                "algorithm": [
                    {"private": {"clip": 1.0, "noise_multiplier": 1.0}},
                    {"fedavg": {"combine": {"norm_bound": {"bound": 1.0}}}},
                ],
            },
            "got FedAvg, which reads each in full: only a mean bounds each one's part",
        ),
        (
            {
                "cohort": {"poisson": {"q": 0.5}},
                "run": {"max_update_norm": 5.0},
                "algorithm": [{"private": {"clip": 1.0, "noise_multiplier": 1.0}}, "fedavg"],
            },
            "run.max_update_norm has no effect beside private, .* got 5",
        ),
        ({"run": {"max_update_norm": 0}}, "run.max_update_norm must be positive, got 0"),
        ({"run": {"max_update_norm": float("nan")}}, "run.max_update_norm: .* finite number"),
        ({"algorithm": {"scaffold": {"combine": "median"}}}, "unknown key 'combine'"),
        ({"algorithm": {"local": {"combine": "median"}}}, "unknown key 'combine'"),
        ({"algorithm": {"fedkseed": {"combine": "median"}}}, "unknown key 'combine'"),
        ({"algorithm": {"fedavg": {"combine": "medain"}}}, "did you mean 'median'"),
        ({"algorithm": {"fedavg": {"combine": "krum"}}}, "needs attackers"),
        ({"algorithm": {"fedavg": {"combine": {"krum": {"attackers": 0}}}}}, "at least 1, got 0"),
        ({"algorithm": {"pfedme": {"combine": {"centred_clip": {"radius": 1}}}}}, None),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused_at_load(tree: Any, said: str | None) -> None:
    whole = {"name": "r", "algorithm": {"fedavg": {"combine": {"krum": {"attackers": 2}}}}, **tree}
    if said is None:
        build_recipe(whole)
    else:
        with pytest.raises(RecipeError, match=said):
            build_recipe(whole)


def test_bulyan_needs_more_than_krum() -> None:
    ask(FedAvg(combine=Krum(2)), Full(), 8)
    with pytest.raises(
        ValueError, match="bulyan needs at least 11 replies a round, got a cohort of"
    ):
        ask(FedAvg(combine=Bulyan(2)), Full(), 8)


def test_the_replies_a_server_waits_for_are_those_of_the_rule() -> None:
    assert describe(FedAvg()).min_replies == 1
    assert describe(Ditto(Clustered(FedAvg(combine=Krum(2))))).min_replies == 7
