"""Every algorithm by its recipe name; the type makes mypy check that each is one."""

import dataclasses
from inspect import signature
from typing import Any

from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.decomfl import DeComFL
from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.local import LocalOnly
from fedloom.algorithms.pfedme import PFedMe
from fedloom.algorithms.private import Private
from fedloom.algorithms.prune import Prune
from fedloom.algorithms.scaffold import Scaffold
from fedloom.core.protocols import Algorithm

ALGORITHMS: dict[str, type[Algorithm[Any]]] = {
    "fedavg": FedAvg,
    "scaffold": Scaffold,
    "pfedme": PFedMe,
    "local": LocalOnly,
    "clustered": Clustered,
    "fedkseed": FedKSeed,
    "decomfl": DeComFL,
    "ditto": Ditto,
    "freeze": Freeze,
    "flasc": Flasc,
    "prune": Prune,
    "private": Private,
}

WRAPPERS = frozenset(
    name
    for name, kind in ALGORITHMS.items()
    if next(iter(signature(kind).parameters), "") == "inner"
)
"""Names of those that hold another algorithm, their first field."""


def planned(algorithm: Any, rounds: int) -> Any:
    """Return the algorithm with any budget it has spread over `rounds`, unless it says over how many."""
    fields = {f.name for f in dataclasses.fields(algorithm)}
    if "inner" in fields:
        algorithm = dataclasses.replace(algorithm, inner=planned(algorithm.inner, rounds))
    if not isinstance(algorithm, Private) or algorithm.epsilon is None:
        return algorithm
    if algorithm.rounds is None:
        return dataclasses.replace(algorithm, rounds=rounds)
    if algorithm.rounds < rounds:
        raise ValueError(
            f"private.rounds must be at least run.rounds ({rounds}), got {algorithm.rounds}"
        )
    return algorithm


def check_steps(algorithm: Any, order: str | None, steps: int | None) -> None:
    """Refuse `local.steps` where the algorithm itself says how far its clients walk, and nothing else trains."""
    inner, layers = algorithm, [algorithm]
    while any(f.name == "inner" for f in dataclasses.fields(inner)):
        inner = inner.inner
        layers.append(inner)
    walks = isinstance(inner, FedKSeed | DeComFL) and order != "first"
    if walks and steps is not None and not any(isinstance(layer, Ditto) for layer in layers):
        name = next(name for name, kind in ALGORITHMS.items() if kind is type(inner))
        raise ValueError(
            f"local.steps has no effect beside {name}, got {steps}: set algorithm.{name}.steps"
        )
