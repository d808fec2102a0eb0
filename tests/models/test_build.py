import copy
from pathlib import Path

import pytest
import torch

from fedloom.models.build import ModelSettings, enable_checkpointing, fingerprint, load_base
from fedloom.spaces.lora import LoRA


def test_a_folder_gives_a_frozen_model_with_its_tokenizer(tiny_folder: Path, capfd):
    base = load_base(ModelSettings(name=str(tiny_folder)))
    assert base.name == str(tiny_folder)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert base.tokenizer.decode(base.tokenizer("ab").input_ids) == "ab"
    assert capfd.readouterr() == ("", "")


def test_type_and_attention_are_as_asked(tiny_folder: Path):
    base = load_base(ModelSettings(name=str(tiny_folder), dtype="bfloat16", attention="eager"))
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert base.model.config._attn_implementation == "eager"


def test_gradient_checkpointing_is_switched_on(tiny_folder: Path):
    base = load_base(ModelSettings(name=str(tiny_folder), gradient_checkpointing=True))
    assert any(vars(m).get("gradient_checkpointing") for m in base.model.modules())


def test_a_model_that_cannot_checkpoint_says_so(tiny_llama):
    model = tiny_llama()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match=r"model.gradient_checkpointing must be false for this"):
        enable_checkpointing(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such/model-at-all", r'model.name must be a causal .* got "no-such/model-at-all"'),
        ("./nowhere", r"model.name must be a folder with a config.json or a Hub id, got ./nowhere"),
        ("builtin:huge", r"model.name: the only built-in model is builtin:tiny, got builtin:huge"),
    ],
)
def test_an_unknown_model_is_one_sentence(name: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        load_base(ModelSettings(name=name))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.name must be a causal language model"):
        load_base(ModelSettings(name=str(tmp_path)))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama(vocab=64).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"knows 103 tokens, but its embedding has 64 rows"):
        load_base(ModelSettings(name=str(tmp_path)))


@pytest.mark.parametrize(("kept", "stand_in"), [("eos_token", "</s>"), ("unk_token", "<unk>")])
def test_a_tokenizer_without_padding_borrows_a_token_and_nothing_grows(
    tiny_llama, tiny_tokenizer, tmp_path, kept, stand_in
):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    for name in ("pad_token", "eos_token", "unk_token"):
        if name != kept:
            setattr(tokenizer, name, None)
    model = tiny_llama(vocab=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = load_base(ModelSettings(name=str(tmp_path)))
    assert base.tokenizer.pad_token == stand_in
    assert len(base.tokenizer) == len(tokenizer)
    assert base.model.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tiny_llama, tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    for name in ("pad_token", "eos_token", "unk_token"):
        setattr(tokenizer, name, None)
    tiny_llama(vocab=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no pad, eos or unk token"):
        load_base(ModelSettings(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"name": ""},
            r"model.name must be a Hub id, a folder, a GGUF file or builtin:tiny, got an empty one",
        ),
        ({"dtype": "int8"}, r"model.dtype must be one of float32, bfloat16, float16, got int8"),
        ({"attention": "flash"}, r"model.attention must be one of .*, got flash"),
        ({"device": "tpu"}, r"model.device must be auto, cpu, cuda or cuda:N, got tpu"),
        ({"device": "cpu:1"}, r"model.device must be auto, cpu, cuda or cuda:N, got cpu:1"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(given, message: str):
    with pytest.raises(ValueError, match=message):
        ModelSettings(**given)


def test_a_device_that_is_not_there_is_refused(tiny_folder: Path):
    with pytest.raises(ValueError, match=r"model.device must be a device of this machine, got"):
        load_base(ModelSettings(name=str(tiny_folder), device="cuda:99"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_is_of_the_frozen_weights_alone(tiny_llama, tiny_folder: Path, dtype):
    model = tiny_llama(dtype=dtype).requires_grad_(False)
    before = fingerprint(model)
    assert before == fingerprint(tiny_llama(dtype=dtype).requires_grad_(False))
    assert before != fingerprint(tiny_llama(seed=1, dtype=dtype).requires_grad_(False))
    base = load_base(ModelSettings(name=str(tiny_folder)))
    plain = fingerprint(base.model)
    space = LoRA().make_space(base, seed=0)
    assert fingerprint(base.model) == plain
    space.load({name: t + 1 for name, t in space.start().items()})
    assert fingerprint(base.model) == plain
    with torch.no_grad():
        base.model.get_input_embeddings().weight[0, 0] += 1
    assert fingerprint(base.model) != plain
