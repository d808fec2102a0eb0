"""The recipes of a run's baselines: the same data, model, seed and evaluation, another algorithm."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fedloom.algorithms import ALGORITHMS
from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.fedavg import FedAvg
from fedloom.clustering.given import Given, Random
from fedloom.clustering.modes import Mode
from fedloom.clustering.sharing import Sharing
from fedloom.data.mixtures import Clusters, MultiDomain
from fedloom.data.partition import stratum
from fedloom.engines.engine_settings import FlowerSettings, InProcessSettings, RaySettings
from fedloom.run.recipe_settings import Baseline, Recipe
from fedloom.server.samplers import SAMPLERS

_UNBOUNDED = 1e30
"""A run.max_update_norm that no training reaches."""


def baseline_of(recipe: Recipe, kind: Baseline, *, summary: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a baseline: the same data, model, seed and evaluation.

    `local` shares nothing; `centralised` trains one model on everybody's data, taking as many steps a round as the
    expected cohort takes together; `fedavg` is the recipe's own fedavg without what is around it, or a plain one;
    `oracle` and `random` are the recipe with clusters by a label, and with as many as it found by chance.

    Args:
        recipe: Of the run.
        kind: Which baseline.
        summary: Of the run: how many clients train, and how many clusters were found.

    Raises:
        ValueError: where there are no clusters to put others in place of, or no label to make them by.
    """
    quiet = dataclasses.replace(recipe.run, baselines=(), trackers=(), samples=0, min_replies=0)
    shared = dataclasses.replace(recipe, name=f"{recipe.name}-{kind}", run=quiet)
    if isinstance(recipe.engine, FlowerSettings | RaySettings):
        # Its clients are on this machine as they are in the run; only the messages are spared.
        shared = dataclasses.replace(shared, engine=InProcessSettings())
    if kind == "centralised":
        return _centralised(shared, summary["num_clients"])
    make: dict[Baseline, Callable[[], Any]] = {
        "local": ALGORITHMS["local"],
        "fedavg": lambda: _layer(recipe.algorithm, FedAvg) or FedAvg(),
        "oracle": lambda: _clustered(recipe.algorithm, Given(_label(recipe))),
        "random": lambda: _clustered(
            recipe.algorithm, Random(summary["num_clusters"], recipe.run.seed)
        ),
    }
    return dataclasses.replace(shared, algorithm=make[kind]())


def _centralised(recipe: Recipe, num_clients: int) -> Recipe:
    cohort = max(1, round(recipe.cohort.rate(num_clients) * num_clients))
    steps = None if recipe.local.steps is None else recipe.local.steps * cohort
    return dataclasses.replace(
        recipe,
        algorithm=ALGORITHMS["fedavg"](),
        cohort=SAMPLERS["full"](),
        data=dataclasses.replace(recipe.data, pooled=True),
        local=dataclasses.replace(recipe.local, steps=steps),
        # It goes as far in a round as a cohort would, and has no stranger to fear.
        run=dataclasses.replace(recipe.run, max_update_norm=_UNBOUNDED),
    )


def _layer(algorithm: Any, kind: type[Any]) -> Any:
    """Return the layer of a kind, however deep; None where there is none."""
    if isinstance(algorithm, kind):
        return algorithm
    names = {field.name for field in dataclasses.fields(algorithm)}
    return _layer(algorithm.inner, kind) if "inner" in names else None


def _clustered(algorithm: Any, mode: Mode) -> Any:
    """Return the algorithm with its clusters made in another way."""
    if _layer(algorithm, Clustered) is None:
        raise ValueError(
            "run.baselines takes oracle and random where the algorithm has clustered among its layers"
        )
    if isinstance(algorithm, Clustered):
        return dataclasses.replace(algorithm, mode=mode, share=Sharing())
    return dataclasses.replace(algorithm, inner=_clustered(algorithm.inner, mode))


def _label(recipe: Recipe) -> str:
    """Return the entry of clients' profiles that clusters are known by."""
    layer = _layer(recipe.algorithm, Clustered)
    if layer is not None and layer.label:
        return str(layer.label)
    if isinstance(recipe.data.partition, Clusters | MultiDomain):
        return "group"
    label = stratum(recipe.data.partition)
    if label is None:
        raise ValueError(
            "run.baselines oracle makes clusters by a label that all examples of a client share: name it in"
            " algorithm.clustered.label, or take a data.partition by a label"
        )
    return label
