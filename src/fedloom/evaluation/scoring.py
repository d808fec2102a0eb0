"""How likely given answers are, and how unsure a model is of the beginning of its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedloom.data.tokens import Example
from fedloom.objectives.batch import Batch
from fedloom.objectives.forward import Forward
from fedloom.objectives.objective import Objective, Score


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation without gradients, and put every submodule back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: a buffer made lazily in there could not be trained with afterwards.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def score(
    model: nn.Module, examples: Sequence[Example], batch_size: int, objective: Objective
) -> list[Score]:
    """Return the scores in the order of the examples, of which up to `batch_size` go through the model at once."""
    forward = Forward.of(model)
    found: dict[int, Score] = {}
    for chosen, batch in batched(examples, batch_size, objective, forward):
        found.update(zip(chosen, objective.scores(forward, batch), strict=True))
    return [found[at] for at in range(len(examples))]


def batched(
    examples: Sequence[Example], batch_size: int, objective: Objective, forward: Forward
) -> Iterator[tuple[Sequence[int], Batch]]:
    """Yield batches of up to `batch_size` examples, and which examples are in each."""
    like = next(forward.model.parameters())
    for chosen in batches([example.num_tokens for example in examples], batch_size, forward):
        yield chosen, objective.batch([[examples[at] for at in chosen]], [1], like, pack=False)


def batches(lengths: Sequence[int], batch_size: int, forward: Forward) -> Iterator[Sequence[int]]:
    """Yield places of rows that go through a model at once, without gradients.

    Longest first: what shares a batch is alike, and the largest batch comes before the others.
    """
    left = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    while left:
        rows = min(batch_size, forward.most_rows(lengths[left[0]]))
        yield left[:rows]
        left = left[rows:]


def answer_entropies(model: nn.Module, prompts: Sequence[Tensor], batch_size: int) -> list[float]:
    """Return the entropy, in nats, of the token after each prompt, (length,) int64, in their order.

    It tells a prompt of the model's kind from others without an answer. The likelihood of the prompt itself misleads:
    training never asks for a prompt's tokens.
    """
    found: dict[int, float] = {}
    with evaluating(model):
        forward = Forward.of(model)
        for chosen in batches([len(prompt) for prompt in prompts], batch_size, forward):
            entropies = _entropies(forward, [prompts[at] for at in chosen])
            found.update(zip(chosen, entropies, strict=True))
    return [found[at] for at in range(len(prompts))]


def _entropies(forward: Forward, prompts: Sequence[Tensor]) -> list[float]:
    device = next(forward.model.parameters()).device
    # The right padding needs no mask under causal attention.
    ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(device)
    last = [at * ids.shape[1] + len(prompt) - 1 for at, prompt in enumerate(prompts)]
    entropies: list[float] = forward.entropies(
        {"input_ids": ids}, torch.tensor(last, device=device)
    ).tolist()
    return entropies
