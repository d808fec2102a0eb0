"""The recipes of a run's baselines: the same data, model, seed and evaluation, another algorithm."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fedloom.algorithms import ALGORITHMS
from fedloom.algorithms.fedavg import FedAvg
from fedloom.clustering.given import Given, Random
from fedloom.clustering.modes import Mode, Regroups
from fedloom.core.protocols import Algorithm
from fedloom.core.wrapper import layers, stacked
from fedloom.data.mixtures import Clusters, MultiDomain
from fedloom.data.partition import Natural
from fedloom.engines.engine_settings import FlowerSettings, InProcessSettings, RaySettings
from fedloom.rounds.recipe_settings import Baseline, Recipe
from fedloom.server.buffering import Buffered, Synchronous
from fedloom.server.samplers import SAMPLERS
from fedloom.spaces.lora import LoRA
from fedloom.spaces.offsite import Offsite
from fedloom.spaces.tune import Tune

_UNBOUNDED = 1e30
"""A run.max_update_norm that no training reaches."""


def baseline_of(recipe: Recipe, kind: Baseline, *, summary: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a baseline: the same data, model, seed and evaluation.

    `local` shares nothing; `centralised` trains one model on everybody's data, taking as many steps a round as the
    expected cohort takes together; `fedavg` is the recipe's own fedavg without what is around it, or a plain one;
    `oracle` and `random` are the recipe with clusters by a label, and with as many as it found by chance; `synchronous`
    is that of `run.mode: buffered`, with as many rounds as the whole cohort makes of the same work.

    Args:
        recipe: Of the run.
        kind: Which baseline.
        summary: Of the run: how many clients train, and how many clusters were found.

    Raises:
        ValueError: where there are no clusters to put others in place of, or no label to make them by.
    """
    quiet = dataclasses.replace(recipe.run, baselines=(), trackers=(), samples=0, min_replies=0)
    shared = dataclasses.replace(recipe, name=f"{recipe.name}-{kind}", run=quiet, audit="off")
    if isinstance(recipe.engine, FlowerSettings | RaySettings):
        # Its clients are on this machine as they are in the run; only the messages are spared.
        shared = dataclasses.replace(shared, engine=InProcessSettings())
    if kind == "synchronous":
        return _synchronous(shared, summary["num_clients"])
    if kind == "centralised":
        return _centralised(shared, summary["num_clients"])
    if kind == "local":
        shared = _waiting(shared)
    make: dict[Baseline, Callable[[], Any]] = {
        "local": ALGORITHMS["local"],
        "fedavg": lambda: next(
            (part for part in layers(recipe.algorithm) if isinstance(part, FedAvg)), FedAvg()
        ),
        "oracle": lambda: _regrouped(recipe.algorithm, lambda: Given(_label(recipe))),
        "random": lambda: _regrouped(
            recipe.algorithm, lambda: Random(summary["num_clusters"], recipe.run.seed)
        ),
    }
    return dataclasses.replace(shared, algorithm=make[kind](), tune=_of_one_rank(recipe, kind))


def check_baseline(recipe: Recipe, kind: Baseline) -> None:
    """Refuse a baseline that cannot be made of a recipe, before there is a run of it.

    Raises:
        ValueError: as `baseline_of`.
    """
    # How many clients there are is not known yet: as many as a cohort needs.
    enough = recipe.cohort.largest(None) or 1
    baseline_of(recipe, kind, summary={"num_clients": enough, "num_clusters": 1})


def _centralised(recipe: Recipe, num_clients: int) -> Recipe:
    mode = recipe.run.mode
    if isinstance(mode, Buffered):
        cohort = mode.size
    else:
        cohort = max(1, round(recipe.cohort.rate(num_clients) * num_clients))
    recipe = _waiting(recipe)
    steps = None if recipe.local.steps is None else recipe.local.steps * cohort
    return dataclasses.replace(
        recipe,
        algorithm=ALGORITHMS["fedavg"](),
        tune=_of_one_rank(recipe, "centralised"),
        cohort=SAMPLERS["full"](),
        data=dataclasses.replace(recipe.data, pooled=True),
        local=dataclasses.replace(recipe.local, steps=steps),
        # It goes as far in a round as a cohort would, and has no stranger to fear.
        run=dataclasses.replace(recipe.run, max_update_norm=_UNBOUNDED),
    )


def _waiting(recipe: Recipe) -> Recipe:
    """Return the recipe with a server that waits for its cohort."""
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, mode=Synchronous()))


def _synchronous(recipe: Recipe, num_clients: int) -> Recipe:
    """Return the recipe with a server that waits, measured after the same work as before."""
    mode, cohort = recipe.run.mode, recipe.cohort.largest(num_clients)
    if not isinstance(mode, Buffered) or cohort is None:
        raise ValueError(
            "run.baselines takes synchronous with run.mode buffered, beside which it stands"
        )
    share, every = mode.size / cohort, recipe.evaluation.every
    waiting = _waiting(recipe)
    return dataclasses.replace(
        waiting,
        run=dataclasses.replace(waiting.run, rounds=max(1, round(recipe.run.rounds * share))),
        evaluation=dataclasses.replace(
            recipe.evaluation, every=max(1, round(every * share)) if every else 0
        ),
    )


def _of_one_rank(recipe: Recipe, kind: Baseline) -> Tune:
    """Return what is tuned, without ranks by tier, a frozen pair and an emulator's factors that the baseline has no use for."""
    tune = recipe.tune
    if kind in ("oracle", "random"):
        return tune
    if isinstance(tune, Offsite):
        inner = tune.adapter
        plain = dataclasses.replace(inner, ranks={}, side=0) if isinstance(inner, LoRA) else inner
        return dataclasses.replace(tune, factors=0, adapter=plain)
    if not isinstance(tune, LoRA):
        return tune
    return dataclasses.replace(tune, ranks={}, side=0)


def _regrouped(algorithm: Algorithm[Any], mode: Callable[[], Mode]) -> Algorithm[Any]:
    """Return the algorithm with its clusters made in another way."""
    parts = list(layers(algorithm))
    at = next((at for at, part in enumerate(parts) if isinstance(part, Regroups)), None)
    if at is None:
        raise ValueError(
            "run.baselines takes oracle and random where the algorithm has clustered among its layers"
        )
    part = parts[at]
    assert isinstance(part, Regroups)
    return stacked([*parts[:at], part.with_grouping(mode()), *parts[at + 1 :]])


def _label(recipe: Recipe) -> str:
    """Return the entry of clients' profiles that clusters are known by."""
    labels = [part.label for part in layers(recipe.algorithm) if isinstance(part, Regroups)]
    if any(labels):
        return next(filter(None, labels))
    if isinstance(recipe.data.partition, Clusters | MultiDomain):
        return "group"
    if isinstance(recipe.data.partition, Natural):
        return recipe.data.partition.by
    raise ValueError(
        "run.baselines oracle makes clusters by a label that all examples of a client share: name it in"
        " algorithm.clustered.label, or take data.partition clusters, multi_domain or natural, by a label"
    )
