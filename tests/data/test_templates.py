"""Templates as models bring them: what they refuse, leave out or rewrite is mended, said or named with its row."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings
from fedloom.data.federation import federate
from fedloom.data.formats import Message, Record
from fedloom.data.manifest import Manifest
from fedloom.data.tokens import Tokenised, tokenise

TURN = "{{ '<|' + m['role'] + '|>\n' + m['content'] | trim }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
ASK = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
)
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE + TURN + "{% endfor %}" + ASK
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}<<{{ messages[0]['content'] }}>>{% endif %}"
    "{% for m in messages if m['role'] != 'system' %}" + TURN + "{% endfor %}" + ASK
)
DEAF = "{% for m in messages if m['role'] != 'system' %}" + TURN + "{% endfor %}" + ASK
REASON = PLAIN.replace("m['content'] | trim", "m['content'].split('</think>')[-1] | trim")
SPACED = PLAIN.replace("m['content'] | trim", "m['content'].split() | join('  ')")
BROKEN = "{% if messages|length > 3 %}{{ 1 + messages[0]['content'] }}{% endif %}" + PLAIN

SYSTEM = Message("system", "Be brief.")
ASKED = Message("user", "What is it?")
SAID = Message("assistant", "Paris")
MORE = (Message("user", "And ten?"), Message("assistant", "eight"))


def record(*messages: Message, place: str = "d.jsonl, line 18") -> Record:
    return Record(messages, {}, messages[-1].content, place=place)


def made(tokenizer: Any, template: str, *records: Record, **given: Any) -> Tokenised:
    other = deepcopy(tokenizer)
    other.chat_template = template
    return tokenise(records, DataSettings(**given), other)


def text(tokenizer: Any, told: Tokenised) -> str:
    (*_, (example,)) = told.examples
    return str(tokenizer.decode(example.ids.tolist()))


# --- system messages -----------------------------------------------------------------------------


@pytest.mark.parametrize("template", [GEMMA, DEAF], ids=["refuses", "leaves out"])
def test_a_system_message_without_a_place_goes_in_front_of_the_question(
    template: str, byte_level: Any
):
    told = made(byte_level, template, record(SYSTEM, ASKED, SAID, *MORE))
    assert text(byte_level, told) == (
        "<|user|>\nBe brief.\n\nWhat is it?<|assistant|>\nParis</s><|user|>\nAnd ten?<|assistant|>\neight</s>"
    )
    (said,) = told.notes
    assert said.startswith("1 conversations whose system message stands in the question")
    ((example,),) = told.examples
    assert example.record == record(SYSTEM, ASKED, SAID, *MORE), "as the data has it"


@pytest.mark.parametrize("template", [GEMMA, DEAF], ids=["refuses", "leaves out"])
def test_where_it_is_refused_its_row_is_named(template: str, byte_level: Any):
    fine = record(ASKED, SAID, place="d.jsonl, line 17")
    with pytest.raises(
        ValueError, match=r"d\.jsonl, line 18: the chat template .* refuses the roles system, user"
    ):
        made(byte_level, template, fine, record(SYSTEM, ASKED, SAID), system_role="refuse")
    assert made(byte_level, template, fine, system_role="refuse").notes == ()


def test_a_template_with_a_place_for_it_is_left_alone(byte_level: Any):
    for given in ({}, {"system_role": "refuse"}):
        told = made(byte_level, PLAIN, record(SYSTEM, ASKED, SAID), **given)
        assert text(byte_level, told).startswith("<|system|>\nBe brief.<|user|>\nWhat is it?")
        assert told.notes == ()


def test_a_system_message_further_on_goes_into_the_question_it_stands_by(byte_level: Any):
    later = Message("system", "Now in German.")
    before = made(byte_level, LLAMA2, record(SYSTEM, ASKED, SAID, later, *MORE))
    assert "<|user|>\nNow in German.\n\nAnd ten?<|assistant|>" in text(byte_level, before)
    behind = made(byte_level, LLAMA2, record(SYSTEM, ASKED, later, SAID, *MORE))
    assert text(byte_level, behind).startswith(
        "<|user|>\nBe brief.\n\nWhat is it?\n\nNow in German.<|assistant|>\nParis"
    )


def test_a_prompt_of_ones_own_without_a_system_text_folds_it_too(byte_level: Any):
    own = {"user": "Q: {content}\n", "assistant": "A: {content}"}
    told = made(byte_level, PLAIN, record(SYSTEM, ASKED, SAID), prompt=own)
    assert text(byte_level, told) == "Q: Be brief.\n\nWhat is it?\nA: Paris</s>"
    with pytest.raises(ValueError, match=r"line 18: data\.prompt needs a text for the role system"):
        made(byte_level, PLAIN, record(SYSTEM, ASKED, SAID), prompt=own, system_role="refuse")


def test_an_instruction_keeps_its_context_apart_where_the_system_is_folded(byte_level: Any):
    asked = Message("user", "Add.\n\n1 and 2", context="1 and 2")
    told = made(byte_level, GEMMA, record(SYSTEM, asked, SAID))
    assert "<|user|>\nBe brief.\n\nAdd.\n\n1 and 2<|assistant|>" in text(byte_level, told)


def test_the_manifest_says_what_was_folded(written: Callable[..., str], byte_level: Any):
    tokenizer = deepcopy(byte_level)
    tokenizer.chat_template = GEMMA
    rows = [{"prompt": f"Count {n}", "completion": "five"} for n in range(8)]
    settings = DataSettings(source=written("a.jsonl", rows), system="Be brief.", num_clients=2)
    manifest = federate(settings, tokenizer).manifest
    (said,) = manifest.left_out()
    assert said.startswith("8 conversations whose system message stands in the question")
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


# --- what cannot be written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            GEMMA,
            (ASKED, ASKED, SAID),
            "d.jsonl, line 18: the chat template of model.name refuses the roles user, user (Conversation roles must "
            "alternate user/assistant): join turns of one role that follow each other, or data.prompt",
        ),
        (
            GEMMA,
            (SYSTEM, ASKED, ASKED, SAID),
            "d.jsonl, line 18: the chat template of model.name refuses the roles user, user (Conversation",
        ),
        (
            GEMMA,
            (ASKED, SAID, SAID),
            "d.jsonl, line 18: the chat template of model.name refuses the roles user, assistant",
        ),
        (
            BROKEN,
            (ASKED, SAID, *MORE),
            "d.jsonl, line 18: the chat template of model.name refuses the roles user, assistant, user, assistant (unsup",
        ),
    ],
    ids=["two questions", "and a system", "two answers", "an error of python"],
)
def test_what_a_template_refuses_is_named_with_its_row(
    template: str, messages: tuple[Message, ...], message: str, byte_level: Any
):
    fine = record(ASKED, SAID, place="d.jsonl, line 17")
    with pytest.raises(ValueError, match=re.escape(message)):
        made(byte_level, template, fine, record(*messages))


def test_a_conversation_that_is_no_row_names_none(byte_level: Any):
    with pytest.raises(ValueError, match=r"^the chat template of model.name refuses"):
        made(byte_level, GEMMA, record(ASKED, ASKED, SAID, place=""))


def test_an_answer_that_a_template_rewrites_is_said_with_the_first_row(byte_level: Any):
    thought = Message("assistant", "<think>Hm.</think> Paris")
    told = made(
        byte_level, REASON, record(ASKED, SAID, place="d.jsonl, line 1"), record(ASKED, thought)
    )
    (said,) = told.notes
    assert said.startswith(
        "1 conversations whose answers the chat template of model.name writes otherwise"
    )
    assert said.endswith("the first at d.jsonl, line 18")
    assert "Hm." not in text(byte_level, told)


def test_white_space_that_a_template_changes_is_no_rewriting(byte_level: Any):
    told = made(byte_level, SPACED, record(ASKED, Message("assistant", "Paris is it")))
    assert (text(byte_level, told)[-17:], told.notes) == ("Paris  is  it</s>", ())


# --- ends ----------------------------------------------------------------------------------------


def test_texts_of_the_end_of_a_turn_and_of_a_sequence_are_both_text(byte_level: Any):
    """The template ends turns with one token, the sequence with another."""
    template = PLAIN.replace("</s>", "<|system|>")
    answer = Message("assistant", "Say <|system|> or </s>, then go on")
    told = made(byte_level, template, record(ASKED, answer), record(ASKED, SAID))
    ids = told.examples[0][0].ids.tolist()
    assert byte_level.decode(ids).endswith("Say <|system|> or </s>, then go on<|system|></s>")
    assert ids.count(byte_level.convert_tokens_to_ids("<|system|>")) == 1
    assert ids.count(byte_level.eos_token_id) == 1


def test_answers_that_all_end_in_the_token_a_template_ends_turns_with_end_once(byte_level: Any):
    template = PLAIN.replace("</s>", "<|system|>")
    told = made(byte_level, template, record(ASKED, Message("assistant", "Paris<|system|>")))
    assert text(byte_level, told).endswith("\nParis<|system|></s>")
    assert told.notes[0].startswith("the text <|system|> ends every answer")
