"""A tiny Llama as a GGUF file, a few kilobytes, for tests that need no real one."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ["<unk>", "<s>", "</s>", "<turn>"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MERGES = ["h e", "l l", "he ll"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
Q = gguf.GGMLQuantizationType


def write_gguf(
    path: Path,
    model: Any,
    kind: gguf.GGMLQuantizationType = Q.F32,
    *,
    architecture: str = "llama",
    tokenizer: str = "gpt2",
    weights: bool = True,
    **values: str | int,
) -> Path:
    """Write a Llama with the tokenizer above; `values` are further keys, with __ for their dots."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    if tokenizer:
        writer.add_tokenizer_model(tokenizer)
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
        writer.add_token_merges(MERGES)
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)
    for key, value in values.items():
        if isinstance(value, int):
            writer.add_uint32(key.replace("__", "."), value)
        else:
            writer.add_string(key.replace("__", "."), value)
    for name, tensor in _tensors(model).items() if weights else ():
        writer.add_tensor(
            name,
            gguf.quantize(tensor, kind) if tensor.ndim > 1 else tensor,
            raw_dtype=kind if tensor.ndim > 1 else Q.F32,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: Any) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    found = {}
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        if ".q_proj." in name or ".k_proj." in name:  # rotary halves, as llama.cpp has them
            halves = array.reshape(model.config.num_attention_heads, 2, -1, array.shape[-1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        found[f"{names.get_name(name.removesuffix('.weight'))}.weight"] = np.ascontiguousarray(
            array
        )
    return found
