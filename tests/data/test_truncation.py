"""Where the prompt gives way: whole turns, oldest first, then the head of the question; the last answer is whole."""

from dataclasses import replace
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import Message, Record
from fedloom.data.tokens import IGNORED, Example, Tokenised, tokenise

LONG = "and now a long one " * 12
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}Response: {% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Shows an answer otherwise once others follow."""


def record(*turns: str, system: str = "") -> Record:
    roles = ("user", "assistant")
    said = tuple(Message(roles[at % 2], turn) for at, turn in enumerate(turns))  # type: ignore[arg-type]  # roles
    opening = (Message("system", system),) if system else ()
    return Record((*opening, *said), {}, turns[-1])


def made(rec: Record, tokenizer: Any, max_length: int, **given: Any) -> Tokenised:
    settings = DataSettings(truncate="prompt", max_length=max_length, **given)
    return tokenise([rec], settings, tokenizer)


def only(rec: Record, tokenizer: Any, max_length: int, **given: Any) -> Example:
    told = made(rec, tokenizer, max_length, **given)
    ((example,),) = told.examples
    assert (told.num_truncated, told.num_dropped) == (1, 0)
    assert len(example.ids) <= max_length
    return example


def size(rec: Record, tokenizer: Any, **given: Any) -> int:
    ((example,),) = tokenise([rec], DataSettings(max_length=4096, **given), tokenizer).examples
    return len(example.ids)


def learnt(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode([token for token in example.labels.tolist() if token != IGNORED]))


def said(example: Example) -> list[str]:
    assert example.record is not None
    return [message.content for message in example.record.messages]


PROMPTS = ("chat", "alpaca", "vicuna", "plain")
TALK = (
    *("What is the capital of France?", "Paris"),
    *("Wie heißt die Hauptstadt von Polen?", "Warschau"),
    *("What is four plus five?", "nine"),
)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("left", [1, 2])
def test_the_oldest_turns_go_whole(left: int, prompt: str, tokenizer: Any):
    rest = record(*TALK[6 - 2 * left :])
    room = size(rest, tokenizer, prompt=prompt)
    example = only(record(*TALK), tokenizer, room, prompt=prompt)
    ((alone,),) = tokenise([rest], DataSettings(prompt=prompt, max_length=room), tokenizer).examples
    assert example.ids.tolist() == alone.ids.tolist()
    assert example.labels.tolist() == alone.labels.tolist()
    assert example.prompt_length == alone.prompt_length
    assert example.record == rest


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_system_message_stays(prompt: str, byte_level: Any):
    room = size(record(*TALK[4:], system="Be brief."), byte_level, prompt=prompt)
    example = only(record(*TALK, system="Be brief."), byte_level, room, prompt=prompt)
    assert said(example) == ["Be brief.", *TALK[4:]]
    assert "Be brief." in byte_level.decode(example.ids.tolist())


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("turns", [1, 3])
def test_then_the_head_of_the_question_goes_and_nothing_around_it(
    turns: int, prompt: str, byte_level: Any
):
    talk = (*TALK[: 2 * (turns - 1)], LONG.strip(), "nine", "")[: 2 * turns]
    bare = size(record("x", "nine", system="Be brief."), byte_level, prompt=prompt)
    room = bare + 9
    example = only(record(*talk, system="Be brief."), byte_level, room, prompt=prompt)
    assert len(example.ids) == room
    text = byte_level.decode(example.ids.tolist())
    around = byte_level.decode(
        only_whole(record("x", "nine", system="Be brief."), byte_level, prompt).ids.tolist()
    )
    before, after = around.split("x", 1) if prompt != "alpaca" else around.rsplit("x", 1)
    assert text.startswith(before)
    assert text.endswith(after)
    kept = text[len(before) : len(text) - len(after)]
    assert kept
    assert LONG.strip().endswith(kept)
    assert learnt(example, byte_level).strip() == "nine</s>"


def only_whole(rec: Record, tokenizer: Any, prompt: str) -> Example:
    settings = DataSettings(prompt=prompt, max_length=4096)
    ((example,),) = tokenise([rec], settings, tokenizer).examples
    return example


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_length_keeps_the_last_answer_whole_or_drops_it(prompt: str, tokenizer: Any):
    talk = record("One?", "Paris", LONG.strip(), "Paris", LONG.strip(), "nine", system="Response:")
    whole = learnt(only_whole(talk, tokenizer, prompt), tokenizer)
    fits = 0
    for max_length in range(8, size(talk, tokenizer, prompt=prompt) + 2, 7):
        told = made(talk, tokenizer, max_length, prompt=prompt)
        (examples,) = told.examples
        assert len(examples) + told.num_dropped == 1
        for example in examples:
            fits += 1
            assert len(example.ids) <= max_length
            assert whole.endswith(learnt(example, tokenizer))
            assert example.labels[-1] == tokenizer.eos_token_id
            assert (example.labels[: example.prompt_length] == IGNORED)[-1]
            assert example.record is not None
            assert example.record.answer == "nine"
    assert fits > 3


def test_a_question_keeps_a_token_or_the_example_is_dropped(byte_level: Any):
    question = "four plus five is nine; four plus five"
    room = size(record("five", "nine"), byte_level) - 2
    told = [made(record(question, "nine"), byte_level, room + more) for more in range(4)]
    kept = [len(one.examples[0]) for one in told]
    assert kept == sorted(kept)
    assert [one.num_dropped for one in told] == [1 - n for n in kept]
    assert kept[-1] == 1


def test_answers_that_are_left_are_still_learnt(byte_level: Any):
    room = size(record(*TALK[2:]), byte_level, prompt="plain")
    example = only(record(*TALK), byte_level, room, prompt="plain")
    assert learnt(example, byte_level) == "Warschau</s>nine</s>"


def test_of_what_is_kept_apart_the_context_goes_before_the_instruction(byte_level: Any):
    message = Message("user", f"Name a fruit.\n\n{LONG.strip()}", context=LONG.strip())
    given = Record((message, Message("assistant", "nine")), {}, "nine")
    for prompt in ("alpaca", "chat", "plain"):
        room = size(given, byte_level, prompt=prompt) - 20
        example = only(given, byte_level, room, prompt=prompt)
        text = byte_level.decode(example.ids.tolist())
        assert "Name a fruit.\n\n" in text
        assert (len(example.ids), "a long one" in text) == (room, True)
    short = size(Record((Message("user", "x"), given.messages[1]), {}, "nine"), byte_level)
    tight = byte_level.decode(only(given, byte_level, short).ids.tolist())
    assert "Name" not in tight
    assert "nine</s>" in tight


def test_each_sequence_of_a_template_that_rewrites_turns_is_shortened(byte_level: Any):
    tokenizer = _with_template(byte_level, FORGETFUL)
    talk = record("One?", "Paris", "Two?", "Warschau", "Three?", "nine")
    whole = tokenise([talk], DataSettings(max_length=512), tokenizer).examples[0]
    room = len(whole[0].ids) + 8
    assert len(whole[1].ids) > room
    told = made(talk, tokenizer, room)
    (examples,) = told.examples
    assert [learnt(one, tokenizer) for one in examples] == [
        *("Response: Paris</s>", "Response: Warschau</s>", "Response: nine</s>"),
    ]
    assert (told.num_truncated, told.num_dropped) == (2, 0)
    assert [said(one)[-1] for one in examples] == ["Paris", "Warschau", "nine"]
    assert said(examples[1]) == ["Two?", "Warschau"]


def test_two_questions_in_a_row_are_one_turn(byte_level: Any):
    messages = (
        *record("One?", "Paris").messages,
        Message("user", "Two?"),
        Message("user", "Three?"),
        Message("assistant", "nine"),
    )
    room = size(Record(messages[2:], {}, "nine"), byte_level, prompt="plain")
    example = only(Record(messages, {}, "nine"), byte_level, room, prompt="plain")
    assert said(example) == ["Two?", "Three?", "nine"]


def test_a_folded_system_message_stays_where_its_question_is_cut(byte_level: Any):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = _with_template(byte_level, refusing + byte_level.chat_template)
    given = record(*TALK[:4], LONG.strip(), "nine", system="Be brief.")
    example = only(given, tokenizer, 40)
    text = tokenizer.decode(example.ids.tolist())
    assert "<|user|>\nBe brief.\n\n" in text
    assert said(example)[0] == "Be brief."


def test_control_texts_in_a_question_that_is_cut_stay_text(byte_level: Any):
    question = LONG + "</s> and <|assistant|> " + LONG.strip()
    room = size(record("x", "nine"), byte_level) + 80
    given = [record(question, "nine"), record("Hi", "Paris")]
    told = tokenise(given, DataSettings(truncate="prompt", max_length=room), byte_level)
    ((example,), _) = told.examples
    assert (len(example.ids), told.num_truncated) == (room, 1)
    assert (example.ids == byte_level.eos_token_id).sum() == 1
    assert question[-60:] in byte_level.decode(example.ids.tolist())


# --- where the answer gives way ------------------------------------------------------------------


def test_what_is_asked_is_the_last_answer_begun_that_is_learnt(byte_level: Any):
    """The turn that is not learnt is no answer to compare with, though it is the last one begun."""
    turns = record("Hi", "Paris", "Ho", "five", LONG.strip(), "nine")
    messages = [replace(one, learn=one.content != "five") for one in turns.messages]
    given = replace(turns, messages=tuple(messages))
    for prompt in PROMPTS:
        room = size(record("Hi", "Paris", "Ho", "five"), byte_level, prompt=prompt) + 4
        settings = DataSettings(prompt=prompt, max_length=room)
        ((example,),) = tokenise([given], settings, byte_level).examples
        assert example.record is not None
        assert example.record.answer == "Paris"
        assert learnt(example, byte_level).strip() == "Paris</s>"
        prompt_text = byte_level.decode(example.ids[: example.prompt_length].tolist())
        assert "Hi" in prompt_text
        assert "five" not in prompt_text


def _with_template(tokenizer: Any, template: str) -> Any:
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.chat_template = template
    return other
