"""A model's configuration as a GGUF file's metadata; what llama.cpp takes for granted and a model has not is refused."""

from typing import Any

import torch
from torch import Tensor

from fedloom.models.gguf_names import GgufNames

ROPE_FACTORS = "rope_freqs.weight"
_ACTIVATION = {"gemma3": "gelu_pytorch_tanh"}
_GLOBAL_EVERY = 6
"""Of gemma3: every sixth layer attends to everything."""


def add_config(writer: Any, names: GgufNames) -> dict[str, Tensor]:
    """Add sizes and constants of a model to a writer; return tensors that follow from them.

    Raises:
        ValueError: where llama.cpp would compute something else.
    """
    config = names.config
    _check(names)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if names.architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base_swa(_rope(config, "sliding_attention")["rope_theta"])
    return _add_rope(writer, names, width)


def _rope(config: Any, kind: str = "full_attention") -> dict[str, Any]:
    """Return how a kind of layers turns positions into angles."""
    parameters: dict[str, Any] = config.rope_parameters
    nested = parameters.get(kind)
    return nested if isinstance(nested, dict) else parameters


def _add_rope(writer: Any, names: GgufNames, width: int) -> dict[str, Tensor]:
    from gguf import RopeScalingType
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope(names.config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3" and names.architecture == "llama":
        scaled, _ = ROPE_INIT_FUNCTIONS[kind](names.config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        return {ROPE_FACTORS: (plain / scaled.double()).float()}
    elif kind != "default":
        _refuse(f"rotary positions of type {kind}")
    return {}


def _check(names: GgufNames) -> None:
    config = names.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != _ACTIVATION.get(names.architecture, "silu"):
        _refuse(f"a {names.architecture} with the activation {activation}")
    if names.architecture == "gemma3":
        kinds = [
            "sliding_attention" if (layer + 1) % _GLOBAL_EVERY else "full_attention"
            for layer in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != kinds:
            _refuse("a gemma3 whose layers attend to everything elsewhere than every sixth")
        if config.query_pre_attn_scalar != config.head_dim or config.final_logit_softcapping:
            _refuse("a gemma3 with scales of attention or of logits of its own")
    elif getattr(config, "use_sliding_window", False):
        _refuse("attention within a window")


def _refuse(what: str) -> None:
    raise ValueError(
        f"a GGUF written here cannot hold {what}: give the model as a GGUF file (model.name), or export with --for merged"
        " and convert that folder with llama.cpp's convert_hf_to_gguf.py"
    )
