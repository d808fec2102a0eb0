"""The trainer that a recipe's sections ask for."""

from dataclasses import replace
from statistics import median

import torch

from fedloom.client.cohort import Cohort, keeps_lanes_apart
from fedloom.client.fast.kernels import FastPath, make_fast
from fedloom.client.local_settings import ZEROTH, LocalSettings
from fedloom.client.mezo import Mezo
from fedloom.client.projected import Projected
from fedloom.client.references import References
from fedloom.client.setup import Setup
from fedloom.client.trainer import ClientEvaluator, Sequential
from fedloom.client.zeroth_order import ZerothOrder
from fedloom.core.protocols import Trainer
from fedloom.data.federation import Federation
from fedloom.models.introspection import (
    adapted_layers,
    forgets_activations,
    keeps_rows_apart,
    learns_adapters_only,
)
from fedloom.models.probe import draws, virtual_tokens
from fedloom.objectives.objective import Objective
from fedloom.objectives.sft import DEFAULT
from fedloom.spaces.live import Live
from fedloom.spaces.seed_space import SeedSpace

GROUP_TOKENS = {"cpu": 512, "cuda": 16384}
"""Of one batch over clients. On a CPU more no longer fits its caches."""
GROUPS = 4
"""Groups' worth of clients a trainer likes at once: enough to put similar ones together."""


def make_trainer(
    space: Live | SeedSpace,
    federation: Federation,
    local: LocalSettings,
    *,
    evaluator: ClientEvaluator,
    num_rounds: int,
    objective: Objective = DEFAULT,
) -> Trainer:
    """Return the fastest trainer that can do the work; it batches over clients where the model allows.

    Raises:
        ValueError: for a setting that would have no effect, or that the space cannot have.
    """
    _check_packing(space, federation)
    _check_precision(space, local)
    order = local.order or ("zeroth" if isinstance(space, SeedSpace) else "first")
    if order == "first":
        local.refuse(ZEROTH, "belongs to local.order zeroth, got first")
    elif forgets_activations(space.model):
        raise ValueError(
            "model.gradient_checkpointing must be false for local.order zeroth, which keeps no activations"
        )
    if isinstance(space, SeedSpace):
        setup = Setup(space, federation, local, num_rounds)
        make = _zeroth if order == "zeroth" else _projected
        return make(setup, evaluator, objective)
    fast = make_fast(space.model, local, objective)
    references = References.of(space, objective, fast.forward)
    plain = Setup(space, federation, local, num_rounds, references)
    sequential = Sequential(plain, fast, evaluator)
    if order == "zeroth":
        return _guessing(sequential)
    layers = adapted_layers(space.model)
    if local.batched == "off" or not layers or draws(space.model):
        return sequential
    group_tokens = local.group_tokens or GROUP_TOKENS[space.device.type]
    lengths = [row.num_tokens for shard in federation.shards.values() for row in shard.train]
    typical = median(lengths) if lengths else 1
    per_group = max(1, int(group_tokens // (local.rows * typical)))
    cohort = Cohort(sequential, layers, group_tokens, GROUPS * per_group)
    return cohort if keeps_lanes_apart(cohort, space.model) else sequential


def _check_packing(space: Live | SeedSpace, federation: Federation) -> None:
    shards = federation.shards.values()
    packed = any(row.positions is not None for shard in shards for row in shard.train)
    if packed and virtual_tokens(space.model):
        raise ValueError(
            "data.packing must be false where tune has virtual tokens: of examples that share a row only the first"
            " would see them"
        )
    if packed and not keeps_rows_apart(space.model):
        raise ValueError(
            f"data.packing must be false for this model ({type(space.model).__name__}), in which examples of one"
            " row would see each other"
        )


def _check_precision(space: Live | SeedSpace, local: LocalSettings) -> None:
    if local.precision == "float32":
        return
    seeds = isinstance(space, SeedSpace)
    if local.order != "first" if seeds else learns_adapters_only(space.model):
        raise ValueError(
            "local.precision bfloat16 is for weights that learn in float32; here the weights are frozen: set"
            " model.dtype bfloat16 instead, which multiplies in bfloat16 and takes half their memory"
        )


def _guessing(sequential: Sequential) -> Trainer:
    space, local = sequential.setup.space, sequential.setup.local
    if space.dropout:
        raise ValueError(
            f"tune.lora.dropout must be 0 for local.order zeroth, which has no dropout, got {space.dropout}"
        )
    local.refuse(
        ("group_tokens",), "has no effect with local.order zeroth, which trains one by one"
    )
    return Mezo(sequential.setup, sequential.fast, sequential.evaluator)


def _zeroth(setup: Setup[SeedSpace], evaluator: ClientEvaluator, objective: Objective) -> Trainer:
    local = setup.local
    if local.optimizer != "sgd":
        raise ValueError(
            "local.optimizer must be sgd where tune is seeds, since a step along a seed is all that is"
            f" kept of a gradient, got {local.optimizer}"
        )
    idle = ["momentum", "betas", "group_tokens"]
    if local.max_grad_norm is not None:
        idle.append("max_grad_norm")
    local.refuse(idle, "has no effect where tune is seeds: local.max_slope bounds a step")
    fast = make_fast(setup.space.model, local, objective, moving=True)
    return ZerothOrder(_comparing(setup, fast), fast, evaluator)


def _comparing(setup: Setup[SeedSpace], fast: FastPath) -> Setup[SeedSpace]:
    return replace(setup, references=References.of(setup.space, fast.objective, fast.forward))


def _projected(
    setup: Setup[SeedSpace], evaluator: ClientEvaluator, objective: Objective
) -> Trainer:
    space = setup.space
    if space.is_quantized or space.values.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            "local.order first where tune is seeds trains the weights themselves, which needs model.dtype"
            " float32 and model.quantize none; local.precision bfloat16 makes it fast"
        )
    setup.local.refuse(
        ("group_tokens",),
        "has no effect where tune is seeds: clients train one by one",
    )
    space.model.requires_grad_(True)
    fast = make_fast(space.model, setup.local, objective)
    return Projected(_comparing(setup, fast), fast, evaluator)
