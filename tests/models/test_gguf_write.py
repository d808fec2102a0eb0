"""GGUF files as transformers and the gguf package read them again."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.models.gguf_files import TEMPLATE, Q, write_gguf

from fedloom.models.build import Base, ModelSettings, load_base, load_tokenizer, write_model
from fedloom.models.gguf_config import ROPE_FACTORS, add_config
from fedloom.models.gguf_names import GgufNames
from fedloom.models.gguf_write import GgufType, write_lora_gguf, write_model_gguf
from fedloom.models.hf_logging import quiet
from fedloom.models.lora_folder import LoraFactors, read_lora
from fedloom.spaces.lora import LoRA

pytestmark = pytest.mark.slow

Llama = Callable[..., Any]
IDS = torch.arange(2, 40)[None]
TYPES: dict[GgufType, float] = {"f32": 1e-6, "f16": 2e-2, "q8_0": 5e-2}
"""How far logits may be from the model's, as a part of their norm."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(ModelSettings(name="builtin:tiny"))


def made(kind: str, tokens: int) -> Any:
    """Return a tiny random model with the head sizes that transformers takes for granted when it reads a GGUF."""
    import transformers as t

    sizes: dict[str, Any] = {
        "vocab_size": tokens,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "tie_word_embeddings": kind != "llama",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "max_position_embeddings": 128,
    }
    gemma: dict[str, Any] = {"num_hidden_layers": 6, "head_dim": 256, "sliding_window": 8}
    few: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any
        if kind == "gemma3":
            model = t.Gemma3ForCausalLM(t.Gemma3TextConfig(**{**sizes, **gemma, **few}))
        elif kind == "qwen3":
            model = t.Qwen3ForCausalLM(t.Qwen3Config(**{**sizes, **few}, head_dim=128))
        elif kind == "qwen2":
            model = t.Qwen2ForCausalLM(t.Qwen2Config(**sizes))
        else:
            model = t.LlamaForCausalLM(t.LlamaConfig(**sizes))
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases, which begin all alike
                weight.data += 0.1 * torch.randn_like(weight)
        return model.eval().requires_grad_(False)


def read_again(file: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    return model.eval().requires_grad_(False)


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / ours.norm())


@pytest.mark.parametrize("kind", ["llama", "tied", "gemma3", "qwen2", "qwen3"])
def test_a_file_read_by_transformers_gives_the_models_logits(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = made(kind, len(tokenizer))
    write_model(Base(model, tokenizer, "a/model"), tmp_path / "whole")
    expected = model(input_ids=IDS).logits
    types: list[GgufType] = [*TYPES] if kind == "llama" else ["f32"]
    for type in types:
        file = tmp_path / f"{type}.gguf"
        write_model_gguf(tmp_path / "whole", file, type=type, name="mine")
        assert far(expected, read_again(file)(input_ids=IDS).logits) <= TYPES[type]
    assert not list(tmp_path.glob("*.part"))


def test_tokenizer_and_template_are_written_and_read_again(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = made("tied", len(tokenizer) + 3)
    model.generation_config.eos_token_id = [0, 4]
    write_model(Base(model, tokenizer, "a/model"), tmp_path / "whole")
    write_model_gguf(tmp_path / "whole", tmp_path / "m.gguf", type="f16", name="mine")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "Grüße, it's 12 o'clock\n\n  <|user|>ok 你好 🙂"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token == tokenizer.eos_token
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    told = {
        key: reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("pre", "eot_token_id")
    }
    assert told == {"pre": "gpt-2", "eot_token_id": 4}
    assert reader.fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert reader.fields["tokenizer.ggml.tokens"].contents()[-1] == f"[PAD{len(tokenizer) + 2}]"
    # The same file is a base model here.
    base = load_base(ModelSettings(name=str(tmp_path / "m.gguf")))
    assert base.model.generation_config.eos_token_id == [0, 4]


def test_a_base_from_a_file_keeps_that_files_metadata(gguf_llama: Any, tmp_path: Path) -> None:
    source = write_gguf(
        tmp_path / "a.gguf", gguf_llama, Q.Q8_0, tokenizer__ggml__eot_token_id=3, llama__note="x"
    )
    base = load_base(ModelSettings(name=str(source)))
    assert base.gguf_path == source
    write_model(base, tmp_path / "whole")
    write_model_gguf(tmp_path / "whole", tmp_path / "b.gguf", type="f32", name="m", source=source)
    before, after = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in "ab")
    own = {"general.file_type", "general.quantization_version"}
    told = [
        {k: f.contents() for k, f in r.fields.items() if not k.startswith("GGUF.") and k not in own}
        for r in (before, after)
    ]
    assert told[0] == told[1]
    assert told[1]["tokenizer.chat_template"] == TEMPLATE
    assert torch.equal(
        read_again(tmp_path / "b.gguf")(input_ids=IDS).logits, base.model(input_ids=IDS).logits
    )


def test_a_tensor_that_only_the_source_has_comes_along(gguf_llama: Any, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf", gguf_llama)
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(tmp_path / "rope.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    factors = np.arange(1, 5, dtype=np.float32)
    writer.add_tensor(ROPE_FACTORS, factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = load_base(ModelSettings(name=str(tmp_path / "rope.gguf")))
    write_model(base, tmp_path / "whole")
    write_model_gguf(
        tmp_path / "whole", tmp_path / "b.gguf", type="q8_0", name="m", source=base.gguf_path
    )
    written = {t.name: t for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert np.array_equal(written[ROPE_FACTORS].data, factors)
    assert written["blk.0.attn_q.weight"].tensor_type == Q.Q8_0


@pytest.mark.parametrize("tune", [LoRA(rank=4), LoRA(rank=4, rslora=True)], ids=["plain", "rslora"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_llama_cpp_makes_of_base_and_adapter_what_the_merged_file_holds(
    kind: str, tune: LoRA, tokenizer: Any, tmp_path: Path
) -> None:
    model = made(kind, len(tokenizer))
    write_model(Base(model, tokenizer, "a/model"), tmp_path / "base")
    space = tune.make_space(Base(model, tokenizer, "a/model"), seed=0)
    draw = torch.Generator().manual_seed(0)
    params = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in space.start().items()}
    space.save(tmp_path / "adapter", params)
    space.save_merged(tmp_path / "merged", params)
    for name in ("base", "merged"):
        write_model_gguf(tmp_path / name, tmp_path / f"{name}.gguf", type="f32", name=name)
    lora = read_lora(tmp_path / "adapter", server="llama.cpp")
    write_lora_gguf(lora, model.config, tmp_path / "lora.gguf")
    base, merged, adapter = (
        gguf.GGUFReader(tmp_path / f"{n}.gguf") for n in ("base", "merged", "lora")
    )
    kinds = {
        k: adapter.fields[k].contents()
        for k in ("general.type", "adapter.type", "general.architecture")
    }
    assert kinds == {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": kind,
    }
    alpha = adapter.fields["adapter.lora.alpha"].contents()
    factors = {t.name: t.data for t in adapter.tensors}
    assert len(factors) == 2 * 7 * 2
    whole = {t.name: t.data for t in merged.tensors}
    for tensor in base.tensors:
        made_of = tensor.data
        if f"{tensor.name}.lora_a" in factors:
            a, b = (factors[f"{tensor.name}.lora_{x}"] for x in "ab")
            made_of = tensor.data + alpha / b.shape[1] * b @ a  # as llama.cpp scales it
        np.testing.assert_allclose(made_of, whole[tensor.name], rtol=1e-5, atol=1e-6)


def pair(rank: int, *, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rank, columns), torch.zeros(rows, rank)


def test_what_llama_cpp_cannot_adapt_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    tied, plain = made("tied", 64), made("llama", 64)
    head = LoraFactors(2, 1.0, {"lm_head": pair(2, rows=64, columns=32)}, None)
    with pytest.raises(
        ValueError, match=r"llama\.cpp has no head to adapt where it is the embedding"
    ):
        write_lora_gguf(head, tied.config, tmp_path / "a.gguf")
    write_lora_gguf(head, plain.config, tmp_path / "b.gguf")
    other = LoraFactors(2, 1.0, {"model.layers.0.router": pair(2, rows=8, columns=32)}, None)
    with pytest.raises(
        ValueError, match=r"llama\.cpp has no tensor for model\.layers\.0\.router\.wei"
    ):
        write_lora_gguf(other, plain.config, tmp_path / "c.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["b.gguf"]


def test_a_tokenizer_of_another_kind_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"with tokenizers of kind gpt-2, smollm, qwen2, llama-bpe, and"
    ):
        write_model_gguf(tiny_folder, tmp_path / "out" / "a.gguf", type="f32", name="x")
    assert not (tmp_path / "out").exists()


def test_numbers_that_f16_has_not_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = made("tied", len(tokenizer))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    write_model(Base(model, tokenizer, "a/model"), tmp_path / "whole")
    with pytest.raises(
        ValueError, match=r"up_proj\.weight holds numbers that f16 has not: export with"
    ):
        write_model_gguf(tmp_path / "whole", tmp_path / "a.gguf", type="f16", name="x")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "llama",
            {"model_type": "gpt2"},
            r"of models of type llama, gemma3_text, qwen2, qwen3, got gp",
        ),
        ("llama", {"hidden_act": "gelu"}, r"cannot hold a llama with the activation gelu"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            r"cannot hold rotary positions of type yarn",
        ),
        ("qwen2", {"use_sliding_window": True}, r"cannot hold attention within a window"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, r"elsewhere than every sixth"),
        ("gemma3", {"query_pre_attn_scalar": 168}, r"scales of attention or of logits of its own"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    class Config:
        pass

    config = Config()
    config.__dict__.update({**made(kind, 64).config.to_dict(), "model_type": kind, **changes})
    if kind == "gemma3":
        config.model_type = "gemma3_text"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=message) as caught:
        add_config(gguf.GGUFWriter(None, "x"), GgufNames.of(config))
    assert not re.search(r"\n", str(caught.value))


def test_stretched_positions_of_llama_3_are_factors() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, max_position_embeddings=512, rope_parameters=rope)
    made_of = add_config(gguf.GGUFWriter(None, "llama"), GgufNames.of(config))
    plain = 5e5 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    theirs = LlamaRotaryEmbedding(config).inv_freq.double()
    torch.testing.assert_close(plain / made_of[ROPE_FACTORS].double(), theirs, rtol=1e-5, atol=0)
