"""How unsure a model is of the first token of its answer, which tells a prompt of its kind from others without an answer.

The likelihood of the prompt itself tells little: training never asks for a prompt's tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedloom.evaluation.scoring import evaluating
from fedloom.objectives.forward import Forward


def answer_entropies(model: nn.Module, prompts: Sequence[Tensor], batch_size: int) -> list[float]:
    """Return the entropy, in nats, of the token after each prompt, (length,) int64, in their order."""
    found: dict[int, float] = {}
    left = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
    with evaluating(model):
        forward = Forward.of(model)
        while left:
            rows = min(batch_size, forward.most_rows(len(prompts[left[0]])))
            chosen, left = left[:rows], left[rows:]
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
