import math
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom.data import polyglot
from fedloom.data.tokens import IGNORED

FOLDER = Path(str(resources.files("fedloom"))) / "models" / "tiny"

TEXTS = {
    "arabic": "مرحبا بالعالم، كيف الحال؟",
    "russian": "Привет, мир! Съешь ещё этих мягких булок.",
    "chinese": "你好，世界。今天天气很好。",
    "turkish": "Çağrı ığdır şöförü, İstanbul'da.",
    "romanian": "Ană are mere și țuică în grădină.",
    "greek": "Καλημέρα κόσμε",
    "hindi": "नमस्ते दुनिया",
    "decomposed accents": "cafe\u0301 and café",
    "emoji": "🧵👩‍💻 fed🙂loom",
    "code": "def f(x):\n\treturn {'a': x ** 2}  # ½\r\n\n\n    pass\n",
    "mathematics": "∑_{i=1}^{n} x_i² ≤ ∫ f(t) dt ≈ 3.14159",
    "spaces": "  two  spaces\n\n\tand a tab ",
    "control characters": "\x00\x07\x1b[0m\ufeff",
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def chat(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_comes_back_unchanged(tokenizer, name):
    ids = tokenizer(TEXTS[name])["input_ids"]
    assert tokenizer.decode(ids) == TEXTS[name]


def test_every_byte_is_a_token(tokenizer):
    alphabet = {token for token in tokenizer.get_vocab() if len(token) == 1}
    assert len(alphabet) == 256
    assert tokenizer.unk_token is None


def test_special_tokens_are_distinct_and_single(tokenizer):
    named = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    ids = [tokenizer(token)["input_ids"] for token in named]
    assert [len(one) for one in ids] == [1] * 5
    assert len({one[0] for one in ids}) == 5
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"


def test_a_prompt_is_a_prefix_of_the_prompt_with_its_answer(tokenizer):
    texts = [*TEXTS.values(), *(row["prompt"] for row in polyglot.rows(60, seed=3))]
    for text in texts:
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        answered = [*turns, {"role": "assistant", "content": "Paris"}]
        prompt = chat(tokenizer, turns, add_generation_prompt=True)
        whole = chat(tokenizer, answered)
        assert whole[: len(prompt)] == prompt
        assert tokenizer.decode(whole[len(prompt) :]) == " Paris<|endoftext|>"


def test_the_template_marks_the_answers_and_refuses_other_roles(tokenizer):
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    encoded = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([i for i, mask in marked if mask]) == " c<|endoftext|>"
    with pytest.raises(Exception, match="role must be system, user or assistant, got tool"):
        chat(tokenizer, [{"role": "tool", "content": "x"}])


def test_the_folder_is_small_and_complete(model):
    assert {file.name for file in FOLDER.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert (FOLDER / "model.safetensors").stat().st_size < 10_000_000
    assert 3_000_000 < sum(p.numel() for p in model.parameters()) < 6_000_000
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_model_card_tells_the_sources_and_the_results():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("apache-2.0", "WordNet", "King James", "PSF", "CLDR", "minutes", "bits per byte"):
        assert word in card


@pytest.mark.parametrize("language", polyglot.LANGUAGES)
def test_held_out_statements_cost_few_bits(model, tokenizer, language):
    statements = polyglot.declarative(60, seed=99, languages=[language])
    rows = [[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]] for text in statements]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    num_bytes = sum(len(text.encode()) for text in statements)
    assert loss.item() / math.log(2) / num_bytes < 0.6


def test_generation_ends_by_itself_or_by_the_limit(model, tokenizer):
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3)
    assert tokenizer.decode(written[0, ids.shape[1] :]).startswith(" Paris")
