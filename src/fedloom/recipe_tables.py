"""Sections of a recipe that are a choice by name, and what they may be."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.clustering.modes import MODES, Mode
from fedloom.core.metrics import Metric
from fedloom.core.sparsity import Density
from fedloom.data.partition import PARTITIONS, Partition
from fedloom.engines.engine_settings import ENGINES, EngineSettings
from fedloom.objectives import OBJECTIVES
from fedloom.objectives.objective import Objective
from fedloom.server.buffering import RUN_MODES, STALENESS, RunMode, Staleness
from fedloom.server.combine import COMBINES, Combine
from fedloom.server.factors.rules import AGGREGATES, Aggregate
from fedloom.server.importance import SEED_SAMPLINGS, SeedSampling
from fedloom.server.optimizers import SERVER_OPTIMIZERS, ServerOptimizer
from fedloom.server.samplers import SAMPLERS, Sampler
from fedloom.spaces.offsite import ADAPTERS, OffsiteAdapter
from fedloom.spaces.tune import TUNES, Tune

TABLES: dict[Any, Mapping[str, type]] = {
    Tune: TUNES,
    OffsiteAdapter: ADAPTERS,
    Partition: PARTITIONS,
    Objective: OBJECTIVES,
    ServerOptimizer: SERVER_OPTIMIZERS,
    Combine: COMBINES,
    Aggregate: AGGREGATES,
    Sampler: SAMPLERS,
    EngineSettings: ENGINES,
    Mode: MODES,
    RunMode: RUN_MODES,
    Staleness: STALENESS,
    SeedSampling: SEED_SAMPLINGS,
}

GROUPS: Mapping[Any, str] = {Objective: "fedloom.objectives"}
"""Choices that other packages may add to, by import path or as entry points of these groups."""

BARE: dict[Any, str] = {Density: "start"}
"""Sections that may be one number: the field it stands for."""

LISTS: dict[Any, type] = {Sequence[str | Metric]: Metric}
"""Lists of names and of {name: settings}, whose settings are those of a dataclass with a name."""
