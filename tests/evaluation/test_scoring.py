from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.evaluation.scoring import answer_entropies


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_doubt_is_the_entropy_of_the_next_token_whatever_shares_its_batch(
    batch_size: int, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama().train()
    prompts = [torch.arange(3, 3 + length) for length in (4, 9, 2, 7, 5)]
    wanted = []
    for prompt in prompts:
        with torch.no_grad():
            chances = model(input_ids=prompt[None]).logits[0, -1].double().softmax(-1)
        wanted.append(float(-(chances * chances.log()).sum()))
    assert answer_entropies(model, prompts, batch_size) == pytest.approx(wanted, rel=1e-5)
    assert model.training
