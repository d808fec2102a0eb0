"""GGUF files that people use, where `make models` has put them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedloom.data.data_settings import DataSettings
from fedloom.data.federation import federate
from fedloom.models.build import ModelSettings, load_base, load_tokenizer
from fedloom.models.gguf_header import read_header
from fedloom.objectives.classification import Classification
from fedloom.objectives.selector import LETTERS

pytestmark = pytest.mark.realmodel
Find = Callable[[str], Path]


@pytest.mark.parametrize(
    ("file", "holds"),
    [
        ("smollm2.gguf", "llama, 134,515,008 parameters as Q4_1 with Q8_0, F32"),
        ("gemma3-270m.gguf", "gemma3, 268,098,176 parameters as Q8_0 with Q5_0"),
    ],
)
def test_a_header_says_what_the_file_holds(real_model: Find, file: str, holds: str):
    assert read_header(real_model(file), file).described().startswith(holds)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "prompt", "begins"),
    [
        ("smollm2.gguf", "chat template of the tokenizer", "<|im_start|>system\n"),
        ("gemma3-270m.gguf", "plain: the tokenizer has no chat template", "<bos>"),
    ],
)
def test_auto_is_the_template_of_an_instruction_model_and_plain_of_a_base_model(
    real_model: Find, file: str, prompt: str, begins: str
):
    tokenizer = load_tokenizer(ModelSettings(name=str(real_model(file))))
    federation = federate(DataSettings(num_examples=40, num_clients=2), tokenizer)
    assert federation.manifest.prompt == prompt
    text = str(tokenizer.decode(federation.shards["client-000"].train[0].ids.tolist()))
    assert text.startswith(begins)
    assert text.count("<bos>") == (begins == "<bos>")


@pytest.mark.slow
def test_smollm2_is_read_as_it_was_trained(real_model: Find):
    base = load_base(ModelSettings(name=str(real_model("smollm2.gguf"))))
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    asked = base.tokenizer.apply_chat_template(
        talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answer = base.model.generate(**asked, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in base.tokenizer.decode(answer[asked["input_ids"].shape[1] :])
    # Words and numbers are cut as SmolLM2's own tokenizer does.
    pieces = base.tokenizer.convert_ids_to_tokens(base.tokenizer("It's 2026\n<|im_end|>").input_ids)
    assert pieces == ["It", "'s", "Ġ", "2", "0", "2", "6", "Ċ", "<|im_end|>"]
    assert len(base.tokenizer) == base.model.config.vocab_size


@pytest.mark.slow
def test_the_letters_of_a_selector_are_a_token_each(real_model: Find):
    tokenizer = load_tokenizer(ModelSettings(name=str(real_model("smollm2.gguf"))))
    for prompt in ("chat", "plain"):
        tokens = Classification(LETTERS).tokens(DataSettings(prompt=prompt), tokenizer)
        assert {letter: tokenizer.decode([token]) for letter, token in tokens.items()} == LETTERS
