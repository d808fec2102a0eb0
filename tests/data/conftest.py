"""Tokenizers of three families, built from a little text, and the real text beside the repository."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEXT = [
    "What is the capital of France? Paris. Wie heißt die Hauptstadt von Polen? Warschau.",
    "### Instruction:\nName a fruit.\n\n### Response:\nApfel, яблоко, 苹果",
    "USER: Count from 1 to 5. ASSISTANT: 1 2 3 4 5",
    "Response: four plus five is nine; ten minus two is eight.",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FAMILIES = ("byte_level", "metaspace", "word_level")


def _byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT * 3, trainer)
    return made


def _metaspace() -> Any:
    """Like SentencePiece: a space in front of every text, unknown characters as bytes, <s> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    made.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always", split=False)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL + bytes_, show_progress=False
    )
    made.train_from_iterator(TEXT * 3, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return made


def _word_level() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        TEXT, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    )
    return made


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Any]:
    """Return one tokenizer of each family, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    makers = dict(zip(FAMILIES, (_byte_level, _metaspace, _word_level), strict=True))
    return {
        name: PreTrainedTokenizerFast(
            tokenizer_object=make(),
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            chat_template=CHAT,
        )
        for name, make in makers.items()
    }


@pytest.fixture(params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    """Return each of the three in turn."""
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def byte_level(tokenizers: dict[str, Any]) -> Any:
    """Return the byte-level one, which loses no text."""
    return tokenizers["byte_level"]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """Return a writer: a name and text, or a value for JSON, or a list of values for JSON Lines, to a path."""

    def write(name: str, content: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            lines = name.endswith(".jsonl")
            content = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write
