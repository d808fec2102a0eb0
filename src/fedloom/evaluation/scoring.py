"""How likely given answers are: a model in evaluation mode, asked for the tokens of examples."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fedloom.data.tokens import Example
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
    forward, like = Forward.of(model), next(model.parameters())
    found: dict[int, Score] = {}
    # Longest first: what shares a batch is alike, and the largest batch comes before the others.
    left = sorted(range(len(examples)), key=lambda at: -len(examples[at].ids))
    while left:
        rows = min(batch_size, forward.most_rows(len(examples[left[0]].ids)))
        chosen, left = left[:rows], left[rows:]
        batch = objective.batch([[examples[at] for at in chosen]], [1], like, pack=False)
        found.update(zip(chosen, objective.scores(forward, batch), strict=True))
    return [found[at] for at in range(len(examples))]
