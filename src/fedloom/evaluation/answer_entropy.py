"""How unsure a model is of the first token of its answer, which tells a prompt of its kind from others without an answer.

The likelihood of the prompt itself tells little: training never asks for a prompt's tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedloom.evaluation.forward import evaluating


def answer_entropies(model: nn.Module, prompts: Sequence[Tensor], batch_size: int) -> list[float]:
    """Return the entropy, in nats, of the token after each prompt, (length,) int64, in their order."""
    found: dict[int, float] = {}
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            entropies = _entropies(model, [prompts[at] for at in chosen])
            found.update(zip(chosen, entropies, strict=True))
    return [found[at] for at in range(len(prompts))]


def _entropies(model: nn.Module, prompts: Sequence[Tensor]) -> list[float]:
    device = next(model.parameters()).device
    # The right padding needs no mask under causal attention.
    ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(device)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    logits = model(input_ids=ids, use_cache=False).logits
    chosen = logits[torch.arange(len(prompts), device=device), last].float().log_softmax(-1)
    entropies: list[float] = torch.special.entr(chosen.exp()).sum(-1).tolist()
    return entropies
