"""Every algorithm by its recipe name; the type makes mypy check that each is one."""

from inspect import signature
from typing import Any

from fedloom.algorithms.alternate import Alternate
from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.decomfl import DeComFL
from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedbiot import FedBiOT
from fedloom.algorithms.fedem import FedEM
from fedloom.algorithms.fedex import FedEx
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.algorithms.fedlora import FedLoRA
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.local import LocalOnly
from fedloom.algorithms.partial_pooling import PartialPooling
from fedloom.algorithms.personal import Personal
from fedloom.algorithms.pfedme import PFedMe
from fedloom.algorithms.private import Private
from fedloom.algorithms.prune import Prune
from fedloom.algorithms.scaffold import Scaffold
from fedloom.core.protocols import Algorithm

ALGORITHMS: dict[str, type[Algorithm[Any]]] = {
    "fedavg": FedAvg,
    "fedlora": FedLoRA,
    "scaffold": Scaffold,
    "pfedme": PFedMe,
    "local": LocalOnly,
    "clustered": Clustered,
    "fedem": FedEM,
    "fedex": FedEx,
    "fedkseed": FedKSeed,
    "decomfl": DeComFL,
    "ditto": Ditto,
    "partial_pooling": PartialPooling,
    "freeze": Freeze,
    "alternate": Alternate,
    "personal": Personal,
    "flasc": Flasc,
    "prune": Prune,
    "private": Private,
    "fedbiot": FedBiOT,
}

WRAPPERS = frozenset(
    name
    for name, kind in ALGORITHMS.items()
    if next(iter(signature(kind).parameters), "") == "inner"
)
"""Names of those that hold another algorithm, their first field."""
