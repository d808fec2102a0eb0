"""The trainer that a recipe's sections ask for."""

from statistics import median

from fedloom.client.cohort import Cohort
from fedloom.client.fast.kernels import make_fast
from fedloom.client.settings import LocalSettings
from fedloom.client.setup import Setup
from fedloom.client.trainer import Evaluator, Sequential
from fedloom.core.protocols import Trainer
from fedloom.data.federation import Federation
from fedloom.models.parts import has_dropout, lora_layers
from fedloom.spaces.live import Live

GROUP_TOKENS = {"cpu": 512, "cuda": 16384}
"""Of one batch over clients. On a CPU more no longer fits its caches."""
GROUPS = 4
"""Groups' worth of clients a trainer likes at once: enough to put similar ones together."""


def make_trainer(
    space: Live,
    federation: Federation,
    local: LocalSettings,
    *,
    evaluator: Evaluator,
    num_rounds: int,
) -> Trainer:
    """Return the fastest trainer that can do the work; it batches over clients where the model allows."""
    setup = Setup(space, federation, local, num_rounds)
    sequential = Sequential(
        setup, make_fast(space.model, local, tuple(federation.classes.values())), evaluator
    )
    layers = lora_layers(space.model)
    if local.batched == "off" or not layers or has_dropout(space.model):
        return sequential
    group_tokens = local.group_tokens or GROUP_TOKENS[space.device.type]
    lengths = [len(row.ids) for shard in federation.shards.values() for row in shard.train]
    typical = median(lengths) if lengths else 1
    per_group = max(1, int(group_tokens // (local.batch_size * typical)))
    return Cohort(sequential, layers, group_tokens, GROUPS * per_group)
