"""What clients learnt from in a round: the audit's own knowledge, by which an attack is told right from wrong."""

from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

import torch
from torch import Tensor

from fedloom.audit.records import Case
from fedloom.client.setup import batches
from fedloom.core.protocols import ClientError, ClientId, Fit, Payload, Task
from fedloom.core.randomness import derive
from fedloom.data.tokens import Example
from fedloom.rounds.received import Received


def learnt(case: Case, received: Received) -> list[Example]:
    """Return the examples of all batches that an upload came of, each once.

    They follow from the seeds of the tasks, as far as clients' first work is to train and example order is the recipe's.
    """
    found: dict[int, Example] = {}
    for client, seed in zip(received.clients, received.seeds, strict=True):
        examples = case.session.federation.shards[client].train
        local, steps = case.recipe.local, _steps(case, received, client, seed)
        stream = batches(examples, local.rows * local.accumulation, derive(seed, 0))
        for batch in islice(stream, steps):
            found |= {id(example): example for example in batch}
    return list(found.values())


def tokens_of(examples: Sequence[Example]) -> Tensor:
    """Return the distinct tokens of examples, rejected answers included, (tokens,) int64 in order."""
    rows = [row.ids for example in examples for row in example.answers]
    return torch.unique(torch.cat(rows)) if rows else torch.zeros(0, dtype=torch.int64)


def _steps(case: Case, received: Received, client: ClientId, seed: int) -> int:
    """Return the optimizer steps that a client took."""
    held = len(case.session.federation.shards[client].train)
    profile = case.session.learners.get(client, {})
    work = None
    nothing: Payload = {}
    task = Task("train", received.round, client, seed, profile, received.download)
    with suppress(ClientError, StopIteration):
        work = next(case.recipe.algorithm.client_update(task, nothing))
    if isinstance(work, Fit) and work.seed_sequence is not None:
        (sequence,) = work.seed_sequence.values()
        return -(-len(sequence) // case.recipe.local.directions)
    override = work.steps if isinstance(work, Fit) else None
    return case.recipe.local.num_steps(held, override)
