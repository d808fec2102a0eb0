"""Chats that call tools, through a template that knows of tools, or as text; and what cannot be read or written."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings, ToolCalls
from fedloom.data.federation import federate
from fedloom.data.formats import Record, to_records
from fedloom.data.preferences import to_pairs, tokenise_answers
from fedloom.data.readers import Row
from fedloom.data.tokens import IGNORED, Example, Tokenised, tokenise
from fedloom.data.tools import read_tools
from fedloom.models.build import ModelSettings, load_tokenizer

TURN = "{{ '<|' + m.role + '|>' + (m.content | trim) }}"
ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = (
    "{% for m in messages %}"
    + TURN
    + "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    + ASK
)
HERMES = (
    "{% if tools %}<|tools|>{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{% for m in messages %}"
    + TURN
    + "{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}{% endif %}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}" + ASK
)
"""As Qwen's and others: tools, calls and results each in a place of their own."""
BY_ID = HERMES.replace("<call>", "<call {{ c.id }}>").replace(
    "m.role + '|>'",
    "m.role + (' ' + m.tool_call_id + ' ' + m.name if m.tool_call_id else '') + '|>'",
)
"""As Mistral's: a result names its call."""
ESCAPED = HERMES.replace("(m.content | trim)", "(m.content | tojson)")
"""As Llama's: text as a JSON string."""
ONE = (
    "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}{% endfor %}" + HERMES
)
DEAF = HERMES.replace("m.role + '|>'", "m.role + '|>'").replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ (first if loop.first else '') + (m.content | trim) }}{% if m.role == 'assistant' %}</s>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""Gemma 3's own, without images: what the system says is the head of the first question."""

ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
LISTED = {"type": "function", "function": ADD}


def call(key: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": json.dumps(arguments)}
    return {"id": key, "type": "function", "function": function}


ASKED = {"role": "user", "content": "1 + 2?"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [call("x", a=1, b=2)]}
TOLD = {"role": "tool", "tool_call_id": "x", "content": "3"}
SAID = {"role": "assistant", "content": "Three."}
OPENAI = {"messages": [ASKED, CALLING, TOLD, SAID], "tools": [LISTED]}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "1 + 2?"},
        {
            "from": "function_call",
            "value": json.dumps({"name": "add", "arguments": {"a": 1, "b": 2}}),
        },
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "Three."},
    ],
    "tools": json.dumps([ADD]),
}


def records(*rows: dict[str, Any], **given: Any) -> list[Record]:
    numbered = [Row(row, "a.jsonl", at + 1, "line") for at, row in enumerate(rows)]
    return list(to_records(numbered, DataSettings(source="a.jsonl", **given)).records)


def made(tokenizer: Any, template: str | None, *rows: dict[str, Any], **given: Any) -> Tokenised:
    other = deepcopy(tokenizer)
    other.chat_template = template
    return tokenise(records(*rows), DataSettings(**given), other)


def text(tokenizer: Any, example: Example) -> str:
    return str(tokenizer.decode(example.ids.tolist()))


def learnt(tokenizer: Any, example: Example) -> str:
    kept = [token for token in example.labels.tolist() if token != IGNORED]
    return str(tokenizer.decode(kept))


# --- through a template --------------------------------------------------------------------------


@pytest.mark.parametrize("row", [OPENAI, SHAREGPT], ids=["OpenAI", "ShareGPT"])
def test_tools_calls_and_results_are_the_templates_and_answers_and_calls_are_learnt(
    row: dict[str, Any], byte_level: Any
):
    told = made(byte_level, HERMES, row)
    ((example,),) = told.examples
    tools = json.dumps([LISTED])[1:-1]
    assert text(byte_level, example) == (
        f'<|tools|>{tools}<|user|>1 + 2?<|assistant|><call>add{{"a": 1, "b": 2}}</call></s>'
        "<|tool|>3<|assistant|>Three.</s>"
    )
    assert learnt(byte_level, example) == '<call>add{"a": 1, "b": 2}</call></s>Three.</s>'
    assert told.notes == ()


def test_a_call_at_the_end_is_compared_as_the_template_writes_it(byte_level: Any):
    row = {"messages": [ASKED, CALLING], "tools": [LISTED]}
    ((example,),) = made(byte_level, HERMES, row).examples
    assert example.record is not None
    assert example.record.answer == '<call>add{"a": 1, "b": 2}</call>'
    ((plain,),) = made(byte_level, HERMES, row, tool_calls="text").examples
    assert plain.record is not None
    assert plain.record.answer == '{"name": "add", "arguments": {"a": 1, "b": 2}}'


def test_results_go_by_the_ids_of_their_calls_and_calls_by_numbers(byte_level: Any):
    calls = {"role": "assistant", "content": "", "tool_calls": [call("x", a=1), call("y", a=2)]}
    other = {"role": "tool", "tool_call_id": "y", "content": "second"}
    first = {"role": "tool", "tool_call_id": "x", "content": "first"}
    row = {"messages": [ASKED, calls, other, first, SAID, ASKED, CALLING, TOLD, SAID]}
    ((example,),) = made(byte_level, BY_ID, row).examples
    written = text(byte_level, example)
    assert re.findall(r"<call (\w+)>", written) == ["call00000", "call00001", "call00002"]
    assert re.findall(r"<\|tool (\w+) add\|>(\w+)", written) == [
        ("call00000", "first"),
        ("call00001", "second"),
        ("call00002", "3"),
    ]


def test_what_a_tool_gave_back_may_be_escaped(byte_level: Any):
    row = {"messages": [ASKED, CALLING, {**TOLD, "content": {"r": "é"}}, SAID]}
    ((example,),) = made(byte_level, ESCAPED, row).examples
    assert '<|tool|>"{\\"r\\": \\"é\\"}"' in text(byte_level, example)


def test_a_template_that_joins_arguments_to_its_text_is_given_json(byte_level: Any):
    joining = HERMES.replace(
        "{{ c.function.arguments | tojson }}", "{{ ' ' + c.function.arguments }}"
    )
    ((example,),) = made(byte_level, joining, OPENAI).examples
    assert learnt(byte_level, example) == '<call>add {"a": 1, "b": 2}</call></s>Three.</s>'


def test_control_tokens_in_calls_results_and_tools_are_text(byte_level: Any):
    tool = {**ADD, "description": "Ends in </s>."}
    said = {"role": "assistant", "content": "a</s>", "tool_calls": [call("x", a="b</s>")]}
    row = {"messages": [ASKED, said, {**TOLD, "content": "c</s>"}, SAID], "tools": [tool]}
    told = made(byte_level, HERMES, row)
    ((example,),) = told.examples
    assert example.ids.tolist().count(byte_level.eos_token_id) == 2, (
        "those that the template writes"
    )
    assert text(byte_level, example).count("</s>") == 6
    assert any("hold the text of control tokens (</s>)" in note for note in told.notes)


def test_whole_turns_give_way_and_no_result_is_left_without_its_call(byte_level: Any):
    long = {"role": "tool", "content": "3 " * 200}
    row = {"messages": [ASKED, CALLING, long, SAID, ASKED, CALLING, TOLD, SAID]}
    told = made(byte_level, HERMES, row, truncate="prompt", max_length=160)
    ((example,),) = told.examples
    assert text(byte_level, example).startswith("<|user|>1 + 2?<|assistant|><call>add")
    assert text(byte_level, example).count("<|tool|>") == 1


def test_a_system_message_that_is_folded_goes_into_the_question_not_into_a_result(byte_level: Any):
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
        + HERMES
    )
    later = {"role": "system", "content": "Be brief."}
    for turns in ([later, ASKED, CALLING, TOLD, SAID], [ASKED, CALLING, later, TOLD, SAID]):
        told = made(byte_level, strict, {"messages": turns})
        ((example,),) = told.examples
        (asked,) = re.findall(r"<\|user\|>(.*?)<\|assistant", text(byte_level, example), re.DOTALL)
        assert "Be brief." in asked
        assert "<|tool|>3<|assistant|>" in text(byte_level, example)


def test_rows_that_differ_in_their_tools_alone_are_no_repetitions(
    written: Callable[..., str], byte_level: Any
):
    tokenizer = deepcopy(byte_level)
    tokenizer.chat_template = HERMES
    rows = [{**OPENAI, "tools": [{**ADD, "name": f"add{n % 4}"}]} for n in range(8)]
    for row in rows:
        row["messages"] = [ASKED, SAID]
    settings = DataSettings(source=written("a.jsonl", rows), num_clients=1, max_length=512)
    assert any(
        "4 rows repeat" in line for line in federate(settings, tokenizer).manifest.left_out()
    )


# --- as text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "given"),
    [(PLAIN, {"tool_calls": "text"}), (HERMES, {"tool_calls": "text"}), (None, {})],
    ids=["no tools", "asked", "no template"],
)
def test_elsewhere_calls_are_json_and_it_is_said(
    template: str | None, given: dict[str, Any], byte_level: Any
):
    told = made(byte_level, template, OPENAI, {"messages": [ASKED, SAID]}, **given)
    (example,), _ = told.examples
    assert '{"name": "add", "arguments": {"a": 1, "b": 2}}' in learnt(byte_level, example)
    assert "<|tool|>" not in text(byte_level, example)
    (note,) = told.notes
    assert note.startswith("1 conversations with tools, as text: calls are JSON in answers")
    assert note.endswith("no list of tools is shown")


NO = {"role": "assistant", "content": "No."}
OTHER = {"role": "assistant", "content": None, "tool_calls": [call("y", a=2, b=2)]}
JSON = '{"name": "add", "arguments": {"a": 1, "b": 2}}'


@pytest.mark.parametrize(
    ("chosen", "rejected", "template", "plain"),
    [
        (CALLING, NO, '<call>add{"a": 1, "b": 2}</call>', JSON),
        (NO, CALLING, "No.", "No."),
        (CALLING, OTHER, '<call>add{"a": 1, "b": 2}</call>', JSON),
        # What reads like a call is none.
        ({"role": "assistant", "content": JSON}, OTHER, JSON, JSON),
    ],
    ids=["call and text", "text and call", "two calls", "text of a call"],
)
def test_calls_in_pairs_are_written_as_in_chats_and_a_row_is_counted_once(
    chosen: Any, rejected: Any, template: str, plain: str, byte_level: Any
):
    before = [ASKED, CALLING, TOLD]
    pair = {"chosen": [*before, chosen], "rejected": [*before, rejected], "tools": [LISTED]}
    other = {
        "No.": ("No.", "No."),
        1: ('<call>add{"a": 1, "b": 2}</call>', JSON),
        2: ('<call>add{"a": 2, "b": 2}</call>', JSON.replace("1", "2")),
    }["No." if rejected is NO else 1 if rejected is CALLING else 2]
    ways: tuple[ToolCalls, ...] = ("template", "text")
    for at, way in enumerate(ways):
        settings = DataSettings(max_length=512, tool_calls=way)
        found = to_pairs([Row(pair, "a.jsonl", 1, "line")], settings).records
        tokenizer = deepcopy(byte_level)
        tokenizer.chat_template = HERMES
        told = tokenise_answers(found, settings, tokenizer)
        ((example,),) = told.examples
        assert example.rejected is not None
        said = [learnt(byte_level, one) for one in (example, example.rejected)]
        assert said == [f"{(template, plain)[at]}</s>", f"{other[at]}</s>"]
        prompt = str(byte_level.decode(example.ids[: example.prompt_length].tolist()))
        assert ("<|tool|>3" in prompt) == (way == "template")
    (note,) = told.notes
    assert note.startswith("1 conversations with tools, as text")


@pytest.mark.parametrize("beside", [True, False], ids=["its call", "its text"])
def test_a_call_and_its_text_are_told_apart_where_a_template_does(beside: bool, byte_level: Any):
    """A pair of a call and the same call is none; of a call and its text it is one, if the template tells them apart."""
    said = CALLING if beside else {"role": "assistant", "content": JSON}
    pair = {"prompt": [ASKED], "chosen": [CALLING], "rejected": [said], "tools": [LISTED]}
    found = to_pairs([Row(pair, "a.jsonl", 1, "line")], DataSettings(max_length=512))
    assert found.losses.num_equal == int(beside)
    tokenizer = deepcopy(byte_level)
    tokenizer.chat_template = HERMES
    if not beside:
        settings = DataSettings(max_length=512, tool_calls="text")
        assert tokenise_answers(found.records, settings, tokenizer).num_equal == 1
        ((example,),) = tokenise_answers(
            found.records, DataSettings(max_length=512), tokenizer
        ).examples
        assert example.rejected is not None


def test_llama_factory_s_calls_in_pairs_are_calls(byte_level: Any):
    asked = [{"from": "human", "value": "1 + 2?"}]
    pair = {
        "conversations": asked,
        "chosen": {"from": "function_call", "value": JSON},
        "rejected": {"from": "gpt", "value": "No."},
        "tools": json.dumps([ADD]),
    }
    (record,) = to_pairs([Row(pair, "a.jsonl", 1, "line")], DataSettings(max_length=512)).records
    tokenizer = deepcopy(byte_level)
    tokenizer.chat_template = HERMES
    ((example,),) = tokenise_answers([record], DataSettings(max_length=512), tokenizer).examples
    assert learnt(byte_level, example) == '<call>add{"a": 1, "b": 2}</call></s>'


# --- what cannot be read or written --------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (PLAIN, OPENAI, "it leaves the tool add out"),
        (PLAIN, {"messages": OPENAI["messages"]}, "it leaves the call of add out"),
        (
            HERMES.replace("{{ c.function.arguments | tojson }}", ""),
            OPENAI,
            "it leaves the call of add out",
        ),
        (
            HERMES.replace("c.function.arguments | tojson", "c.function.arguments"),
            OPENAI,
            "it writes the arguments of add as Python prints them",
        ),
        (DEAF, OPENAI, "it leaves out what a tool gave back"),
        (
            ONE,
            {"messages": [ASKED, {**CALLING, "tool_calls": [call("x"), call("y")]}]},
            "one call at a time",
        ),
    ],
    ids=["tools", "calls", "arguments", "printed", "results", "refuses"],
)
def test_a_template_that_cannot_is_one_sentence(
    template: str, row: dict[str, Any], reason: str, byte_level: Any
):
    message = (
        f"a.jsonl, line 2: the chat template of model.name cannot write a conversation with tools ({reason}): set"
        " data.tool_calls to text"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        made(byte_level, template, {"messages": [ASKED, SAID]}, row)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("add", 'tools must be a list of functions that may be called, got "add"'),
        (3, "tools must be a list of functions that may be called, got 3"),
        (ADD, "tools must be a list of functions that may be called, got {"),
        (str([ADD]), "; such texts are lists or objects as Python prints them"),
        ('[{"name": "add"', "tools must be a list of functions that may be called, got"),
        (["add"], 'tools[0] must be a function with a name, got "add"'),
        ([ADD, {}], "tools[1] must be a function with a name, got {}"),
        ([{**ADD, "name": ""}], "tools[0] must be a function with a name, got {"),
        (
            [{"type": "function", "function": {"description": "x"}}],
            "tools[0] must be a function with",
        ),
        (
            [{"type": "retrieval", "function": ADD}],
            'tools[0].type must be function, got "retrieval"',
        ),
        ([{**ADD, "parameters": "x"}], 'tools[0].parameters must be a JSON schema, got "x"'),
        ([{**ADD, "weight": float("nan")}, {**ADD, "limit": float("inf")}], "tools holds a number"),
    ],
    ids=str,
)
def test_tools_that_cannot_be_read_are_named_with_their_row(tools: Any, message: str):
    with pytest.raises(ValueError, match=re.escape("a.jsonl, line 1: tools")) as error:
        records({"messages": [ASKED, SAID], "tools": tools})
    assert message in str(error.value)


@pytest.mark.parametrize("empty", [None, "", " ", [], "[]", float("nan")], ids=str)
def test_no_tools_are_no_tools(empty: Any, byte_level: Any):
    told = made(byte_level, PLAIN, {"messages": [ASKED, SAID], "tools": empty})
    ((example,),) = told.examples
    assert text(byte_level, example) == "<|user|>1 + 2?<|assistant|>Three.</s>"
    assert told.notes == ()


def test_nulls_that_a_table_fills_in_are_no_parameters():
    filled = {**ADD, "strict": None, "parameters": {"type": "object", "required": None}}
    (tool,) = json.loads(read_tools([{"type": "function", "function": filled}], "line 1"))
    assert tool["function"] == {**ADD, "parameters": {"type": "object"}}


def test_tool_calls_are_written_in_one_of_two_ways():
    with pytest.raises(ValueError, match=r"data\.tool_calls must be template or text, got 'json'"):
        DataSettings(tool_calls="json")  # type: ignore[arg-type]


# --- what templates do to what the system says ----------------------------------------------------


def test_a_template_that_folds_what_the_system_says_is_said_to(byte_level: Any):
    """Gemma has no system role: its template puts the text at the head of the first question."""
    system = {"role": "system", "content": "Be brief."}
    told = made(
        byte_level, GEMMA3, {"messages": [system, ASKED, SAID]}, {"messages": [ASKED, SAID]}
    )
    (example,), _ = told.examples
    assert "<start_of_turn>user\nBe brief.\n\n1 + 2?" in text(byte_level, example)
    (note,) = told.notes
    assert note.startswith("1 conversations whose system message stands in the question")


# --- real models ---------------------------------------------------------------------------------


@pytest.mark.realmodel
@pytest.mark.slow
def test_smollm2_has_no_form_for_tools_and_learns_calls_as_text(
    real_model: Callable[[str], Path], real_text: Path
):
    tokenizer = load_tokenizer(ModelSettings(name=str(real_model("smollm2.gguf"))))
    rows = json.loads((real_text / "chat" / "glaive_toolcall_en.json").read_text())[:40]
    told = made(tokenizer, tokenizer.chat_template, *rows, tool_calls="text", max_length=1024)
    assert sum(map(len, told.examples)) == 40
    assert told.notes[0].endswith("no list of tools is shown")
    with pytest.raises(
        ValueError, match=r"cannot write a conversation with tools .* set data.tool_calls to text"
    ):
        made(tokenizer, tokenizer.chat_template, *rows)


@pytest.mark.realmodel
@pytest.mark.slow
def test_gemma_reads_what_the_system_says_at_the_head_of_the_question(
    real_model: Callable[[str], Path],
):
    tokenizer = load_tokenizer(ModelSettings(name=str(real_model("gemma3-270m.gguf"))))
    system = {"role": "system", "content": "Be brief."}
    template = GEMMA3.replace("</s>", "<end_of_turn>")
    told = made(tokenizer, template, {"messages": [system, ASKED, SAID]})
    ((example,),) = told.examples
    assert text(tokenizer, example).startswith("<bos><start_of_turn>user\nBe brief.\n\n1 + 2?")
    assert told.notes[0].startswith("1 conversations whose system message stands in the question")
    with pytest.raises(ValueError, match="cannot write a conversation with tools"):
        made(tokenizer, template, OPENAI)
