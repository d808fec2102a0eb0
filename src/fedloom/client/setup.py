"""What trainers share, and the order in which a client's examples come."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Generic, TypeVar

import torch

from fedloom.client.local_settings import LocalSettings
from fedloom.client.references import References
from fedloom.core.protocols import ClientError, ClientId, Fit, Job, Params, Split, Trainer
from fedloom.core.randomness import generator
from fedloom.data.federation import Federation
from fedloom.data.tokens import Example

S = TypeVar("S", covariant=True)
Step = Sequence[Example]
"""One lane's examples of one optimizer step."""


@dataclass(frozen=True)
class Setup(Generic[S]):
    """What trainers share."""

    space: S
    federation: Federation
    local: LocalSettings
    num_rounds: int
    """Where learning-rate schedules end."""
    references: References | None = None
    """Of an objective that compares with a reference model."""

    def steps(self, job: Job, start: Params, num_steps: int) -> Iterator[Step]:
        """Yield a job's optimizer steps, of which no more than `num_steps` are asked for.

        Args:
            job: Whose examples, in an order that follows from its seed.
            start: Where its training begins.
            num_steps: How many there will be.
        """
        local = self.local
        examples = _weighed(self.examples(job.client), job)
        stream = batches(examples, local.rows * local.accumulation, job.seed)
        if self.references is None:
            return stream
        taken = list(islice(stream, num_steps))
        flat = [example for step in taken for example in step]
        carrying = iter(self.references.carried(flat, download=start))
        return iter([list(islice(carrying, len(step))) for step in taken])

    def examples(self, client: ClientId, split: Split | None = None) -> Sequence[Example]:
        """Return a client's examples, training ones by default; a client without any cannot take part."""
        shard = self.federation.shards.get(client)
        if shard is None:
            raise ClientError(f"{client} is not among the clients of this data set")
        rows = {None: shard.train, "validation": shard.validation, "test": shard.test}[split]
        if not rows:
            raise ClientError(f"{client} has no {split or 'training'} examples")
        return rows


def check_by_token(examples: Sequence[Example]) -> None:
    """Refuse examples whose loss is not a sum over their own tokens.

    Raises:
        ValueError: where answers are compared.
    """
    if any(example.good is not None for example in examples):
        raise ValueError(
            "algorithm fedem goes by how likely each answer is, which an objective of preferences does not learn: set"
            " objective: sft or classification"
        )


def refuse_factors(work: Fit) -> None:
    """Refuse other rates than the recipe's, and columns of adapters, where steps are along seeds.

    Raises:
        ValueError: naming who asks for them.
    """
    if (work.lr_factor, work.decay_factor) != (1.0, 1.0):
        raise ValueError(
            "algorithm fedex with arms of other learning rates or weight decays needs adapters or weights to be tuned,"
            " got tune: seeds"
        )
    if work.tail:
        raise ValueError(
            "fedlora.prune gives up columns of adapters, got tune: seeds: set tune: lora"
        )


def _weighed(examples: Sequence[Example], job: Job) -> Sequence[Example]:
    """Return the examples with what each counts in the loss."""
    weights = job.work.example_weights if isinstance(job.work, Fit) else None
    if weights is None:
        return examples
    check_by_token(examples)
    pairs = zip(examples, weights.tolist(), strict=True)
    return [replace(example, weight=weight) for example, weight in pairs]


@dataclass(frozen=True)
class TrainerParts:
    """What a trainer of the user's own is made from."""

    setup: Setup[Any]
    """Space, clients' examples, the recipe's `local` section and the number of rounds."""
    tokenizer: Any
    default: Trainer
    """Fedloom's own trainer of the recipe: what it does not do itself, a trainer may leave to this one."""


def batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[Step]:
    """Yield shuffled batches without end; the last one of an epoch may be short."""
    epoch = 0
    while True:
        order = torch.randperm(len(examples), generator=generator(seed, "epoch", epoch)).tolist()
        for at in range(0, len(order), size):
            yield [examples[i] for i in order[at : at + size]]
        epoch += 1
