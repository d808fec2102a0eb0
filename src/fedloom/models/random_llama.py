"""A random Llama of any size, for tests: nothing is read from a disk or a hub."""

from typing import TYPE_CHECKING

import torch

from fedloom.core.randomness import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def random_llama(
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    vocab: int = 64,
    dtype: torch.dtype = torch.float32,
) -> "PreTrainedModel":
    """Return a Llama with two heads and random weights, in evaluation mode.

    Args:
        seed: Of the weights.
        hidden: Width of the residual stream; the MLP is twice as wide.
        layers: Number of blocks.
        vocab: Tokens, of which the first three are padding, begin and end.
        dtype: Of the weights, drawn in float32 whatever this says.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with seeded(seed):
        return LlamaForCausalLM(config).to(dtype).eval()
