"""What benchmarks of training have in common: a random model or one from a file, and nobody who evaluates it."""

from collections.abc import Sequence
from typing import Any

import torch

from fedloom.core.protocols import Metrics
from fedloom.models.build import ModelSettings, load_base

VOCABULARY = 4096


def random_llama(hidden: int, layers: int, vocabulary: int = VOCABULARY) -> Any:
    """Return a random Llama, the same one every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def model_from(settings: ModelSettings) -> Any:
    """Return a model as a recipe's `model` section names it, in evaluation mode."""
    return load_base(settings).model.eval()


class Unasked:
    """Stands where an evaluator would: nothing here is evaluated."""

    def measure_each(self, model: Any, groups: Any, *, split: Any) -> Sequence[Metrics]:
        """Return nothing."""
        return []
