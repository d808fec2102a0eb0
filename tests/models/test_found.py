import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedloom.models.build import ModelSettings, load_base, load_config, load_tokenizer
from fedloom.models.found import check_folder, found


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "mine"))


def sharded(folder: Path, make: Callable[..., object]) -> None:
    make(vocab=103).save_pretrained(folder, max_shard_size="30KB")  # type: ignore[attr-defined]
    (folder / "model.safetensors").unlink()


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_base(ModelSettings(name=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a model"])
def test_a_folder_with_an_adapter_is_no_model(copied: Path, beside: bool):
    (copied / "adapter_config.json").write_text('{"base_model_name_or_path": "a/base"}')
    if not beside:
        (copied / "config.json").unlink()
    refused(
        copied, r"mine holds an adapter \(adapter_config.json\); give its base model \(a/base\)"
    )


@pytest.mark.parametrize("kept", [None, "tokenizer_config.json"])
def test_a_folder_without_a_tokenizer_says_so(copied: Path, kept):
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if file != kept:
            (copied / file).unlink()
    refused(copied, r"mine has no tokenizer.*save one beside its weights")


def test_a_tokenizer_made_of_nothing_is_none(tmp_path: Path):
    """Transformers makes an empty one where GPT-2's files are missing."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer: save one beside its weights"):
        load_tokenizer(ModelSettings(name=str(tmp_path)))


def test_a_missing_part_of_the_weights_is_named(copied: Path, tiny_llama):
    sharded(copied, tiny_llama)
    load_base(ModelSettings(name=str(copied)))
    gone = sorted(copied.glob("model-0*"))[1]
    gone.unlink()
    refused(copied, rf"mine lacks {gone.name}, which its model.safetensors.index.json names")


def test_parts_of_the_weights_without_their_index_say_so(copied: Path, tiny_llama):
    sharded(copied, tiny_llama)
    (copied / "model.safetensors.index.json").unlink()
    refused(copied, r"mine holds model-0\S+ and \d+ more without the model.safetensors.index.json")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", r"its config.json is no JSON"),
        ("config.json", "[]", r"its config.json must hold a JSON object, got list"),
        ("config.json", "[" * 100_000, r"its config.json is no JSON"),
        ("tokenizer_config.json", "[1]", r"its tokenizer_config.json must hold a JSON object"),
        ("tokenizer.json", "{}", r"has no tokenizer that can be read"),
        ("model.safetensors", "git-lfs", r"model.name must be a causal .*: SafetensorError"),
        ("model.safetensors.index.json", "{}", r"its model.safetensors.index.json has no weight"),
    ],
)
def test_a_broken_file_is_named(copied: Path, file: str, text: str, message: str):
    (copied / file).write_text(text)
    refused(copied, message)


def test_bytes_that_are_no_text_are_named(copied: Path):
    (copied / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(copied, r"its config.json is no JSON")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llama99", r"llama99.* does not recognize this architecture"),
        ("model_type", None, r"model.name must be a causal language model .*: Unrecognized model"),
        ("hidden_size", "big", r"Field 'hidden_size' expected int"),
        ("num_attention_heads", 7, r"not a multiple of the number of attention heads"),
        ("vocab_size", 99, r"asks for lm_head.weight of shape \(99, 32\), got \(103, 32\)"),
    ],
)
def test_a_configuration_that_fits_nothing_is_one_sentence(copied: Path, key, value, message):
    told = json.loads((copied / "config.json").read_text())
    told[key] = value
    if value is None:
        del told[key]
    (copied / "config.json").write_text(json.dumps(told))
    refused(copied, message)


def test_a_configuration_need_not_name_its_class(copied: Path):
    told = json.loads((copied / "config.json").read_text())
    del told["architectures"]
    (copied / "config.json").write_text(json.dumps(told))
    assert load_base(ModelSettings(name=str(copied))).model.config.hidden_size == 32


@pytest.mark.parametrize("lost", ["lm_head", "layers.1"])
def test_weights_in_no_file_would_be_random(copied: Path, lost: str):
    file = copied / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if lost not in name}
    save_file(kept, file, metadata={"format": "pt"})
    refused(copied, rf"{lost}.* of 21 tensors are in none of its files and would be random")


def test_an_encoder_is_refused_as_it_is_loaded(tiny_tokenizer, tmp_path: Path):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        BertLMHeadModel(BertConfig(vocab_size=103, intermediate_size=32, **sizes)).save_pretrained(
            tmp_path
        )
    tiny_tokenizer.save_pretrained(tmp_path)
    refused(tmp_path, r"must be a causal language model, but .* sees the tokens after the one")


def test_whatever_is_raised_becomes_a_sentence_with_its_reason():
    message = r"^it is broken: AttributeError: no more$"
    with pytest.raises(ValueError, match=message), found("it is broken"):
        raise AttributeError("no\n  more. And so on.")
    message = r"^it is broken: ZeroDivisionError$"
    with pytest.raises(ValueError, match=message), found("it is broken"):
        raise ZeroDivisionError
    with pytest.raises(MemoryError), found("it is broken"):
        raise MemoryError


def test_a_configuration_is_read_without_weights(copied: Path):
    (copied / "model.safetensors").unlink()
    assert load_config(ModelSettings(name=str(copied))).hidden_size == 32
    check_folder(copied, "mine")
