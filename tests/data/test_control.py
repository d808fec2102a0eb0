"""Text of the data that reads like a control token is learnt, asked and compared as text, whatever the tokenizer."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.data.control import Controls
from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Encoder, lengths
from fedloom.data.formats import Message, Record
from fedloom.data.tokens import IGNORED, Example, Tokenised, tokenise

CONTROLS = ("</s>", "<s>", "<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>")
SAID = [
    "With </s> as a rule",
    "</s>",
    "ends in </s>",
    "</s></s>b",
    "<s>x",
    "<|assistant|>hi<|user|> ho",
    "With <pad>",
    "\U000f0003 and </s> \U000f0001",
]
QUESTIONS = ["What is it?", "tell <|assistant|> </s> more"]
CHATTY = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% if m.role == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def record(question: str, answer: str) -> Record:
    return Record((Message("user", question), Message("assistant", answer)), {}, answer)


OTHER = record("What is it?", "Paris")
"""Beside the one that is looked at, so that a last </s> is no habit of the data."""


def made(tokenizer: Any, *records: Record, **settings: Any) -> Tokenised:
    return tokenise([*records, OTHER], DataSettings(**({"max_length": 512} | settings)), tokenizer)


def learnt(example: Example) -> list[int]:
    return [token for token in example.labels.tolist() if token != IGNORED]


def fast(tokens: Any, **given: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, **(names | given))


def unigram() -> Any:
    """A vocabulary in which the end token is also the likeliest word for its letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted({letter for text in (*SAID, *QUESTIONS, "?Paris[]:\n") for letter in text})
    words = [*((text, 0.0) for text in ("<unk>", *CONTROLS) if text), ("▁", -4.0)]
    pieces = dict([*words, *((letter, -5.0) for letter in letters if letter != " ")])
    tokens = Tokenizer(models.Unigram(list(pieces.items()), unk_id=0))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokens.decoder = decoders.Metaspace(prepend_scheme="first")
    tokens.add_special_tokens(list(CONTROLS))
    return fast(tokens, chat_template=CHATTY)


def python() -> Any:
    """A tokenizer without Rust: a token a byte."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATTY
    return tokenizer


@pytest.fixture(scope="module")
def families(tokenizers: dict[str, Any]) -> dict[str, Any]:
    """Return all kinds that lose no text."""
    kept = {name: tokenizers[name] for name in ("byte_level", "metaspace")}
    return {**kept, "unigram": unigram(), "python": python()}


@pytest.mark.parametrize("family", ["byte_level", "metaspace", "unigram", "python"])
@pytest.mark.parametrize("prompt", ["chat", "alpaca", "vicuna", "plain"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_what_is_said_comes_back_whole_and_ends_once(
    question: str, prompt: str, family: str, families: dict[str, Any]
):
    tokenizer = families[family]
    tokens = tokenizer.added_tokens_decoder.items()
    controls = [
        at for at, token in tokens if token.content in CONTROLS and token.content != "<unk>"
    ]
    told = made(tokenizer, *(record(question, said) for said in SAID), prompt=prompt)
    *examples, (plain,) = told.examples
    for said, (example,) in zip(SAID, examples, strict=True):
        *answer, end = learnt(example)
        assert end == tokenizer.eos_token_id
        assert tokenizer.decode(answer).strip() == said
        assert question in tokenizer.decode(example.ids[: example.prompt_length].tolist())
        for token in controls:
            assert (example.ids == token).sum() == (plain.ids == token).sum()
        assert example.record is not None
        assert example.record.answer == said


def test_conversations_beside_are_encoded_as_ever(tokenizer: Any):
    (*_, (beside,)) = made(tokenizer, record("</s>", "<s> a"), prompt="chat").examples
    ((alone,),) = tokenise([OTHER], DataSettings(max_length=512), tokenizer).examples
    assert beside.ids.tolist() == alone.ids.tolist()
    assert beside.labels.tolist() == alone.labels.tolist()


def test_a_vocabulary_without_its_letters_still_learns_no_end_token(tokenizers: dict[str, Any]):
    tokenizer = tokenizers["word_level"]
    ((example,), _) = made(tokenizer, record("Hi", "Paris </s> Paris")).examples
    assert (example.ids == tokenizer.eos_token_id).sum() == 1
    assert learnt(example).count(tokenizer.convert_tokens_to_ids("Paris")) == 2


def test_the_text_is_encoded_as_the_tokenizer_encodes_text(byte_level: Any):
    ((example,), _) = made(byte_level, record("Hi", "With </s> as a rule"), prompt="plain").examples
    whole = byte_level(
        "Hi\nWith </s> as a rule", add_special_tokens=False, split_special_tokens=True
    )
    assert example.ids.tolist() == [*whole["input_ids"], byte_level.eos_token_id]


def test_white_space_beside_a_token_that_takes_it_in_goes_as_ever(make_taking: Callable[[], Any]):
    tokenizer = make_taking()
    template = (
        "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} </s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.chat_template = template
    ((hidden,), (plain,)) = made(tokenizer, record("What </s> it?", "Paris")).examples
    assert tokenizer.decode(hidden.ids.tolist()) == tokenizer.decode(plain.ids.tolist()).replace(
        "What is it", "What </s> it"
    )


@pytest.fixture
def make_taking() -> Callable[[], Any]:
    """Return a maker of a tokenizer whose role tokens take the white space behind them in, and its end token before."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def make() -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
        tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokens.decoder = decoders.ByteLevel()
        for text in CONTROLS:
            takes = {"rstrip": text.startswith("<|"), "lstrip": text == "</s>"}
            tokens.add_special_tokens([AddedToken(text, special=True, **takes)])
        return fast(tokens)

    return make


def test_added_tokens_are_text_where_the_template_marks_turns_with_them(make_taking: Any):
    tokenizer = make_taking()
    tokenizer.add_tokens(["<think>", "[user]", "user"])
    tokenizer.chat_template = CHATTY
    question = "a user said [user] and <think> and </s>"
    ((example,), _) = made(tokenizer, record(question, "Paris")).examples
    ids = example.ids.tolist()
    assert [ids.count(tokenizer.convert_tokens_to_ids(text)) for text in ("[user]", "<think>")] == [
        1,
        1,
    ]
    assert question in tokenizer.decode(ids)
    ((example,), _) = made(tokenizer, record(question, "Paris"), prompt="plain").examples
    assert example.ids.tolist().count(tokenizer.convert_tokens_to_ids("[user]")) == 1


def test_a_template_of_ones_own_writes_control_tokens(byte_level: Any):
    own = {"user": "<|user|>{content}", "assistant": "<|assistant|>{content}"}
    ((example,), _) = made(byte_level, record("<|user|>", "Paris"), prompt=own).examples
    ids = example.ids.tolist()
    assert ids.count(byte_level.convert_tokens_to_ids("<|user|>")) == 1
    assert byte_level.decode(ids) == "<|user|><|user|><|assistant|>Paris</s>"


def test_a_context_that_is_kept_apart_is_text_too(byte_level: Any):
    message = Message("user", "Add </s>.\n\n1 </s> 2", context="1 </s> 2")
    said = Record((message, Message("assistant", "3")), {}, "3")
    ((example,), _) = made(byte_level, said, prompt="alpaca").examples
    assert "### Instruction:\nAdd </s>.\n\n### Input:\n1 </s> 2\n" in byte_level.decode(
        example.ids.tolist()
    )
    assert (example.ids == byte_level.eos_token_id).sum() == 1


def test_lengths_count_the_text(byte_level: Any):
    whole, plain = lengths(["a </s> b", "a b"], byte_level)
    assert plain == 3
    assert byte_level.decode(list(range(8)))  # as many letters as there are
    assert whole == len(byte_level("a </s> b", split_special_tokens=True)["input_ids"]) > plain


def test_it_is_said_once_with_the_texts(byte_level: Any):
    records = [record("Hi </s>", "a"), record("<s>", "b </s> c")]
    assert made(byte_level, *records).notes == (
        "2 conversations hold the text of control tokens (</s>, <s>), taken as text",
    )
    assert made(byte_level).notes == ()


PARTS = st.sampled_from([*CONTROLS, "<", "|", "s>", "/", " ", "\n", "a", "é", "\U000f0000", "苹"])


@given(st.lists(PARTS, max_size=8).map("".join), st.lists(PARTS, max_size=8).map("".join))
def test_any_text_round_trips_and_holds_no_control_token(left: str, right: str):
    tokenizer = BYTES
    controls, encoder = Controls.of(tokenizer), Encoder.of(tokenizer)
    messages, hidden = controls.hide([Message("user", left), Message("assistant", right)])
    written = f"<|user|>{messages[0].content}</s>{messages[1].content}</s>"
    ids = encoder.ids(written, hidden)
    assert tokenizer.decode(ids) == f"<|user|>{left}</s>{right}</s>"
    control = {tokenizer.convert_tokens_to_ids(text) for text in CONTROLS}
    special = [token for token in ids if token in control]
    assert tokenizer.decode(special) == "<|user|></s></s>"


def _bytes() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens(list(CONTROLS))
    return fast(tokens)


BYTES = _bytes()
