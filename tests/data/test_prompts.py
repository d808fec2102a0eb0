"""Conversations as text: what each prompt writes, and what of it is learnt."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import Message, Record
from fedloom.data.prompts import Segment
from fedloom.data.rendering import make_render
from fedloom.data.templates import ChatTemplate

ASK = Message("user", "Add.\n\n1 and 2", context="1 and 2")
SHORT = Message("user", "Hi")
SUM = Message("assistant", "3")
HELLO = Message("assistant", "Hello")


@dataclass(frozen=True)
class Templated:
    """A tokenizer as far as prompts go, with jinja as transformers renders it."""

    chat_template: str | None = None
    eos_token: str | None = "</s>"
    added_tokens_decoder: Mapping[int, Any] = field(default_factory=dict)
    all_special_ids: list[int] = field(default_factory=list)

    def apply_chat_template(
        self,
        conversation: list[dict[str, object]],
        *,
        tools: list[dict[str, object]] | None = None,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        from jinja2 import Environment, TemplateError

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = Environment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = raise_exception
        template = environment.from_string(self.chat_template or "")
        return template.render(
            messages=conversation, tools=tools, add_generation_prompt=add_generation_prompt
        )


def record(*messages: Message) -> Record:
    return Record(messages, {}, messages[-1].content)


def written(
    rec: Record, tokenizer: ChatTemplate | None = None, **given: Any
) -> tuple[Segment, ...]:
    (rendering,) = make_render(DataSettings(**given), tokenizer or Templated())(rec)
    return rendering.segments


def text(segments: tuple[Segment, ...]) -> str:
    return "".join(segment.text + "</s>" * segment.end for segment in segments)


def learnt(segments: tuple[Segment, ...]) -> list[str]:
    return [segment.text + "</s>" * segment.end for segment in segments if segment.learn]


def test_alpaca_shows_the_input_apart_or_not_at_all():
    """With-input and no-input templates."""
    with_input = text(written(record(ASK, SUM), prompt="alpaca"))
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3</s>"
    )
    without = text(written(record(SHORT, HELLO), prompt="alpaca"))
    assert without == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHi\n\n### Response:\nHello</s>"
    )
    assert "None" not in with_input + without
    assert "### Input" not in without


def test_vicuna_puts_the_space_in_front_of_the_answer_into_the_answer():
    """FedMLLM's prompt ended in a space that training had merged into the first word."""
    segments = written(record(SHORT, HELLO, SHORT, HELLO), prompt="vicuna")
    assert text(segments).endswith(
        "questions. USER: Hi ASSISTANT: Hello</s>USER: Hi ASSISTANT: Hello</s>"
    )
    assert learnt(segments) == [" Hello</s>", " Hello</s>"]


def test_plain_is_the_text_and_a_line_break():
    assert text(written(record(SHORT, HELLO), prompt="plain")) == "Hi\nHello</s>"


def test_every_answer_of_a_conversation_is_learnt_and_ends():
    for prompt in ("alpaca", "vicuna", "plain"):
        segments = written(record(SHORT, HELLO, ASK, SUM), prompt=prompt)
        assert [said.strip() for said in learnt(segments)] == ["Hello</s>", "3</s>"]
        assert [segment.learn for segment in segments] == [False, True, False, True]


def test_a_system_message_replaces_the_default_one():
    system = Message("system", "Be brief.")
    assert (
        text(written(record(system, SHORT, HELLO), prompt="vicuna"))
        == "Be brief. USER: Hi ASSISTANT: Hello</s>"
    )
    alpaca = text(written(record(system, SHORT, HELLO), prompt="alpaca"))
    assert alpaca == "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>"
    assert (
        text(written(record(system, SHORT, HELLO), prompt="plain")) == "Be brief.\n\nHi\nHello</s>"
    )


def test_a_prompt_of_ones_own():
    own = {"system": "({content})\n", "user": "Q: {content}\n", "assistant": "A: {content}.\n"}
    segments = written(record(Message("system", "s"), SHORT, HELLO, SHORT, HELLO), prompt=own)
    assert text(segments) == "(s)\nQ: Hi\nA: Hello.</s>\nQ: Hi\nA: Hello.</s>"
    assert learnt(segments) == [" Hello.</s>", " Hello.</s>"]


def test_braces_in_the_data_stay():
    said = record(Message("user", "{content} {x}"), Message("assistant", "{content}\\1"))
    assert text(written(said, prompt="plain")) == "{content} {x}\n{content}\\1</s>"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            {"user": "{content}"},
            "data.prompt must map user, assistant and perhaps system to texts, got user",
        ),
        ({"user": "{content}", "assistant": "{content}", "bot": "x"}, "got user, assistant, bot"),
        (
            {"user": "Q", "assistant": "{content}"},
            "data.prompt.user must contain {content} once, got 'Q'",
        ),
    ],
)
def test_a_wrong_prompt_of_ones_own_is_refused(prompt: dict[str, str], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_render(DataSettings(prompt=prompt), Templated())


def test_a_system_message_needs_a_text_for_it():
    own = {"user": "{content}", "assistant": "{content}"}
    with pytest.raises(ValueError, match=r"data\.prompt needs a text for the role system"):
        written(record(Message("system", "s"), SHORT, HELLO), prompt=own, system_role="refuse")


def test_a_tokenizer_without_end_token_is_refused():
    with pytest.raises(ValueError, match="has no end-of-sequence token, so no answer could end"):
        make_render(DataSettings(), Templated(eos_token=None))


# --- chat templates ------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# The end of a turn is not the end of a sequence.
GEMMA = CHATML.replace("</s>", "<turn>")
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML
)
# Earlier answers lose what the last one shows, as where reasoning is dropped.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chat_learns_the_answer_and_the_end_token_once():
    segments = written(record(SHORT, HELLO), Templated(CHATML))
    assert text(segments) == "<user>Hi</s>\n<assistant>Hello</s>"
    assert learnt(segments) == ["Hello</s>"]


def test_chat_learns_every_answer():
    segments = written(record(SHORT, HELLO, ASK, SUM), Templated(CHATML))
    assert (
        text(segments)
        == "<user>Hi</s>\n<assistant>Hello</s>\n<user>Add.\n\n1 and 2</s>\n<assistant>3</s>"
    )
    assert learnt(segments) == ["Hello</s>", "3</s>"]


def test_a_template_that_ends_turns_otherwise_still_ends_the_sequence():
    segments = written(record(SHORT, HELLO, ASK, SUM), Templated(GEMMA))
    assert learnt(segments) == ["Hello<turn>", "3<turn></s>"]
    assert text(segments).endswith(
        "Hello<turn>\n<user>Add.\n\n1 and 2<turn>\n<assistant>3<turn></s>"
    )


def test_a_template_that_rewrites_earlier_turns_gives_each_answer_a_sequence():
    render = make_render(DataSettings(), Templated(FORGETFUL))
    first, second = render(record(SHORT, HELLO, ASK, SUM))
    assert text(first.segments) == "<user>Hi</s><assistant><think></think>Hello</s>"
    assert first.record.answer == "Hello"
    assert text(second.segments).endswith(
        "Hello</s><user>Add.\n\n1 and 2</s><assistant><think></think>3</s>"
    )
    assert learnt(second.segments) == ["<think></think>3</s>"]
    assert second.record.answer == "3"


def test_chat_without_a_template_says_what_else_there_is():
    message = "the tokenizer of model.name has no chat template: set data.prompt to one of alpaca, vicuna, plain"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_render(DataSettings(prompt="chat"), Templated())


def test_auto_is_the_chat_template_where_there_is_one_and_plain_elsewhere():
    said = record(SHORT, HELLO)
    for tokenizer, name, words in (
        (Templated(CHATML), "chat", "chat template of the tokenizer"),
        (Templated(), "plain", "plain: the tokenizer has no chat template"),
        (Templated(""), "plain", "plain: the tokenizer has no chat template"),
    ):
        auto = make_render(DataSettings(), tokenizer)
        named = make_render(DataSettings(prompt=name), tokenizer)
        assert auto(said) == named(said)
        assert auto.prompt == words
    assert make_render(DataSettings(prompt="plain"), Templated(CHATML)).prompt == "plain"
    own = {"user": "Q: {content} ", "assistant": "A: {content}"}
    assert make_render(DataSettings(prompt=own), Templated()).prompt == "texts of the recipe's own"


def test_auto_hides_no_failure_of_a_template_that_is_there():
    odd = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    for template, message in (
        (odd, "does not write a conversation as its gen"),
        ("{{ 1 / 0 }}", "refuses"),
    ):
        with pytest.raises(ValueError, match=f"the chat template of model.name {message}"):
            written(record(SHORT, HELLO), Templated(template), prompt="auto")


def test_a_template_that_refuses_a_role_says_what_to_change():
    message = "the chat template of model.name refuses the roles system, user (no system role): set data.system_role to fold"
    with pytest.raises(ValueError, match=re.escape(message)):
        written(
            record(Message("system", "s"), SHORT, HELLO), Templated(STRICT), system_role="refuse"
        )


def test_a_template_whose_generation_prompt_is_no_prefix_is_refused():
    odd = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(
        ValueError, match="does not write a conversation as its generation prompt and then"
    ):
        written(record(SHORT, HELLO), Templated(odd))
