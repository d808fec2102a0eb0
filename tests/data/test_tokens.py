"""The boundary between prompt and answer, whatever the tokenizer; truncation; what is learnt."""

import copy
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import Message, Record
from fedloom.data.tokens import IGNORED, Example, pack, tokenise

PROMPTS: dict[str, Any] = {
    "chat": "chat",
    "alpaca": "alpaca",
    "vicuna": "vicuna",
    "plain": "plain",
    # The last letters of the prompt and the first of the answer would be one token.
    "merging": {"user": "{content}", "assistant": "Respo{content}"},
}
ANSWERS = [
    "Paris",
    "nse: four",
    "42",
    " two  spaces",
    "яблоко, 苹果",
    "\nline",
    "Hauptstadt von Polen.",
]


def record(*turns: str) -> Record:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], turn) for i, turn in enumerate(turns))  # type: ignore[arg-type]  # roles
    return Record(messages, {}, turns[-1])


def only(rec: Record, tokenizer: Any, **given: Any) -> Example:
    made = tokenise([rec], DataSettings(**given), tokenizer)
    assert (made.num_truncated, made.num_dropped) == (0, 0)
    ((example,),) = made.examples
    return example


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- the boundary --------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_mask_covers_exactly_the_prompt(prompt: str, answer: str, tokenizer: Any):
    """Each template x tokenizer, BPE boundary included."""
    example = only(record("What is it?", answer), tokenizer, prompt=PROMPTS[prompt])
    assert (example.labels[: example.prompt_length] == IGNORED).all()
    assert torch.equal(
        example.labels[example.prompt_length :], example.ids[example.prompt_length :]
    )
    assert example.num_targets == len(example.ids) - example.prompt_length >= 1
    assert example.ids.dtype == example.labels.dtype == torch.int64


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_prompt_has_the_same_tokens_whatever_the_answer(prompt: str, tokenizer: Any):
    """The tokens of a prompt are a prefix of those of prompt and answer, so generation starts where training did."""
    examples = [
        only(record("What is it?", answer), tokenizer, prompt=PROMPTS[prompt]) for answer in ANSWERS
    ]
    starts = {tuple(example.ids[: example.prompt_length].tolist()) for example in examples}
    assert len(starts) == 1


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_one_end_token_follows_the_answer(prompt: str, answer: str, tokenizer: Any):
    example = only(record("What is it?", answer), tokenizer, prompt=PROMPTS[prompt])
    end = tokenizer.eos_token_id
    assert example.ids[-1] == example.labels[-1] == end
    assert (example.ids == end).sum() == 1


@pytest.mark.parametrize("prompt", ["alpaca", "vicuna", "plain"])
def test_text_that_does_not_merge_is_encoded_at_once(prompt: str, byte_level: Any):
    example = only(record("What is it?", "Paris"), byte_level, prompt=prompt)
    text = byte_level.decode(example.ids.tolist())
    assert text.endswith("Paris</s>")
    assert example.ids.tolist() == ids(byte_level, text)


def test_a_merge_across_the_boundary_is_kept_out_and_no_text_is_lost(byte_level: Any):
    whole = "What is it?Response: four"
    assert (
        ids(byte_level, "What is it?Respo")
        != ids(byte_level, whole)[: len(ids(byte_level, "What is it?Respo"))]
    )
    example = only(record("What is it?", "nse: four"), byte_level, prompt=PROMPTS["merging"])
    assert byte_level.decode(example.ids[: example.prompt_length].tolist()) == "What is it?Respo"
    assert byte_level.decode(example.ids.tolist()) == whole + "</s>"


def test_a_split_answer_gets_no_space_of_the_tokenizers_own(tokenizers: dict[str, Any]):
    """SentencePiece puts a space in front of every text; inside one it would be a word break nobody wrote."""
    example = only(
        record("What is it?", "nse: four"), tokenizers["metaspace"], prompt=PROMPTS["merging"]
    )
    assert (
        tokenizers["metaspace"].decode(example.ids.tolist()) == "<s> What is it?Response: four</s>"
    )


def test_the_begin_token_is_written_where_the_tokenizer_writes_it(tokenizers: dict[str, Any]):
    begin = tokenizers["metaspace"].bos_token_id
    for prompt in ("plain", "chat"):
        example = only(record("Hi", "Paris"), tokenizers["metaspace"], prompt=prompt)
        assert example.ids[0] == begin
        assert (example.ids == begin).sum() == 1, "a chat template writes its own"
    assert only(record("Hi", "Paris"), tokenizers["byte_level"], prompt="plain").ids[0] != begin


def test_auto_gives_the_tokens_of_the_prompt_it_comes_to(tokenizer: Any):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    for name, one in (("chat", tokenizer), ("plain", bare)):
        auto, named = (only(record("Hi", "Paris"), one, prompt=p) for p in ("auto", name))
        assert torch.equal(auto.ids, named.ids)
        assert torch.equal(auto.labels, named.labels)
        assert auto.prompt_length == named.prompt_length


def test_a_tokenizer_that_reads_no_special_token_from_text_still_ends(byte_level: Any):
    class Deaf:
        """Takes the end token in a text for letters."""

        eos_token, eos_token_id, bos_token_id, chat_template = "</s>", 2, None, None
        added_tokens_decoder: ClassVar[dict[int, Any]] = {}
        all_special_ids: ClassVar[list[int]] = []

        def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any:
            return {"input_ids": [[10 + ord(letter) for letter in one] for one in text]}

    example = only(record("Hi", "Paris"), Deaf(), prompt="plain")
    assert example.ids.tolist() == [10 + ord(letter) for letter in "Hi\nParis"] + [2]
    assert example.prompt_length == 3


# --- conversations -------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_answer_of_a_conversation_is_learnt(prompt: str, tokenizer: Any):
    example = only(
        record("What is it?", "Paris", "And ten?", "eight"), tokenizer, prompt=PROMPTS[prompt]
    )
    end = tokenizer.eos_token_id
    assert (example.labels == end).sum() == 2
    assert (example.labels[: example.prompt_length] != IGNORED).any(), (
        "the first answer is before the last prompt"
    )
    shorter = only(record("What is it?", "Paris"), tokenizer, prompt=PROMPTS[prompt])
    assert torch.equal(example.ids[: len(shorter.ids)], shorter.ids)
    assert torch.equal(example.labels[: len(shorter.ids)], shorter.labels)


def test_examples_carry_their_record_and_come_in_order(byte_level: Any):
    given = [record("Count", str(n)) for n in range(2500)]
    made = tokenise(given, DataSettings(prompt="plain"), byte_level)
    assert [examples[0].record for examples in made.examples] == given


# --- truncation ----------------------------------------------------------------------------------

LONG = " ".join(["one two three four"] * 20)


def test_max_length_is_honoured_and_what_is_cut_is_counted(tokenizer: Any):
    """The maximal length holds; what does not fit is reported and dropped, not NaN."""
    given = [record("Hi", "Paris"), record("Hi", LONG), record(LONG, "Paris")]
    made = tokenise(given, DataSettings(prompt="plain", max_length=16), tokenizer)
    assert [len(examples) for examples in made.examples] == [1, 1, 0]
    assert (made.num_truncated, made.num_dropped) == (1, 1)
    ((whole,), (cut,), ()) = made.examples
    assert len(whole.ids) < 16 == len(cut.ids)
    assert cut.num_targets >= 1
    assert cut.ids[-1] != tokenizer.eos_token_id, "a cut answer does not teach to stop"


def test_every_example_has_a_target_at_every_length(tokenizer: Any):
    """At least one unmasked label, or a counted skip."""
    given = [record("What is it?" * n, "Paris" * m) for n in range(1, 6) for m in range(1, 6)]
    for max_length in (8, 9, 13, 21, 34, 55):
        made = tokenise(given, DataSettings(prompt="plain", max_length=max_length), tokenizer)
        kept = [example for examples in made.examples for example in examples]
        assert len(kept) + made.num_dropped == len(given)
        assert all(example.num_targets >= 1 and len(example.ids) <= max_length for example in kept)


def test_the_prompt_gives_way_from_its_beginning_where_asked(tokenizers: dict[str, Any]):
    settings = DataSettings(prompt="plain", max_length=16, truncate="prompt")
    for name, tokenizer in tokenizers.items():
        whole = only(record(LONG, "Paris"), tokenizer, prompt="plain", max_length=1000)
        made = tokenise([record(LONG, "Paris")], settings, tokenizer)
        ((example,),) = made.examples
        assert (made.num_truncated, made.num_dropped, len(example.ids)) == (1, 0, 16)
        begin = 1 if name == "metaspace" else 0
        assert torch.equal(example.ids[:begin], whole.ids[:begin])
        assert torch.equal(example.ids[begin:], whole.ids[begin - 16 :])
        assert torch.equal(example.labels[begin:], whole.labels[begin - 16 :])
        assert example.num_targets == whole.num_targets


def test_an_answer_longer_than_everything_is_dropped_where_the_prompt_gives_way(byte_level: Any):
    settings = DataSettings(prompt="plain", max_length=16, truncate="prompt")
    made = tokenise([record("Hi there", LONG)], settings, byte_level)
    assert (made.examples, made.num_truncated, made.num_dropped) == ([()], 0, 1)


def test_a_conversation_that_is_cut_ends_in_the_last_answer_begun(byte_level: Any):
    full = record("Hi", "Paris", LONG, "Warschau")
    made = tokenise([full], DataSettings(prompt="plain", max_length=24), byte_level)
    ((example,),) = made.examples
    assert example.record == record("Hi", "Paris")
    start = byte_level.decode(example.ids[: example.prompt_length].tolist())
    assert (start, len(example.ids), made.num_truncated) == ("Hi\n", 24, 1)


def test_an_empty_prompt_does_not_learn_its_first_token(byte_level: Any):
    prompt = {"user": "{content}", "assistant": "{content}"}
    example = only(record("", "Paris is it"), byte_level, prompt=prompt)
    assert (example.prompt_length, int(example.labels[0])) == (0, IGNORED)
    assert example.num_targets == len(example.ids) - 1


def example(length: int, mark: int = 1) -> Example:
    ids = torch.full((length,), mark)
    labels = ids.clone()
    labels[0] = IGNORED
    return Example(ids, labels, prompt_length=1)


def test_rows_hold_whole_examples_with_positions_from_zero_and_labels_intact():
    rows = pack([example(3, 1), example(5, 2), example(2, 3), example(6, 4)], 8)
    assert [row.ids.tolist() for row in rows] == [[4] * 6 + [3] * 2, [2] * 5 + [1] * 3]
    first, second = rows
    assert first.positions is not None
    assert first.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert first.labels.tolist() == [IGNORED, 4, 4, 4, 4, 4, IGNORED, 3]
    assert second.labels.tolist() == [IGNORED, 2, 2, 2, 2, IGNORED, 1, 1]
    assert (first.prompt_length, first.record) == (0, None)


@given(st.lists(st.integers(2, 32), max_size=60))
def test_nothing_is_lost_and_no_row_is_too_long(lengths: list[int]):
    rows = pack([example(length, mark) for mark, length in enumerate(lengths)], 32)
    assert sum(len(row.ids) for row in rows) == sum(lengths)
    assert sum(row.num_targets for row in rows) == sum(length - 1 for length in lengths)
    for row in rows:
        assert row.positions is not None
        assert len(row.ids) == len(row.labels) == len(row.positions) <= 32
        starts = row.positions == 0
        assert (row.labels[starts] == IGNORED).all(), "nothing is predicted from another example"
        for mark in row.ids.unique().tolist():
            assert int((row.ids == mark).sum()) == lengths[mark], "examples are whole"


@given(st.lists(st.integers(2, 32), min_size=2, max_size=60))
def test_at_most_one_row_is_half_empty(lengths: list[int]):
    rows = pack([example(length) for length in lengths], 32)
    assert sum(len(row.ids) <= 16 for row in rows) <= 1
