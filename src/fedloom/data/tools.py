"""Tools of a conversation: which there are, calls of them and what these gave back, read from a row and given to a template."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from fedloom.data.cells import PRINTED, is_missing, is_printed, short, to_text
from fedloom.data.jsontext import json_of

COLUMN = "tools"
"""Of a row: the functions that may be called."""
CALLS = ("tool_calls", "function_call")
"""Keys of a turn that hold calls."""


@dataclass(frozen=True, slots=True)
class Call:
    """A function that is called."""

    name: str
    arguments: str
    """A JSON object."""
    id: str = ""
    """By which a result names it, where the data has that."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a call gave back."""

    content: str
    id: str = ""
    """Of the call, where the data has that."""
    name: str = ""
    """Of the function, likewise."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Calls of a turn with what is said beside them, or results of calls; the turn's content is all of it as one text."""

    said: str = ""
    calls: tuple[Call, ...] = ()
    results: tuple[Result, ...] = ()


# --- read ---------------------------------------------------------------------------------------


def read_tools(value: object, row: str) -> str:
    """Return a cell's list of functions as JSON, as templates take it: objects of type function; nothing where it is empty.

    Raises:
        ValueError: with the place of the row.
    """
    found = json_of(value)
    if is_missing(found) or (isinstance(found, str) and not found.strip()):
        return ""
    place = f"{row}: {COLUMN}"
    if not isinstance(found, list | tuple):
        hint = f"; such texts {PRINTED}" if is_printed(found) else ""
        raise ValueError(
            f"{place} must be a list of functions that may be called, got {short(found)}{hint}"
        )
    tools = [_function(tool, f"{place}[{at}]") for at, tool in enumerate(found)]
    try:
        return to_text(tools) if tools else ""
    except ValueError as error:
        raise ValueError(f"{place} {error}") from error


def _function(tool: object, place: str) -> Mapping[str, object]:
    tool = json_of(tool)
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    inner = json_of(tool.get("function")) if isinstance(tool, Mapping) else None
    function = tool if is_missing(inner) else inner
    named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
    if not isinstance(function, Mapping) or not named or not str(function["name"]).strip():
        raise ValueError(f"{place} must be a function with a name, got {short(tool)}")
    if not is_missing(inner) and not is_missing(kind) and kind != "function":
        raise ValueError(f"{place}.type must be function, got {short(kind)}")
    parameters = json_of(function.get("parameters"))
    if not is_missing(parameters) and not isinstance(parameters, Mapping):
        raise ValueError(f"{place}.parameters must be a JSON schema, got {short(parameters)}")
    bare = {**function, "parameters": parameters}
    # Tables fill keys that another row has with null.
    return {"type": "function", "function": _without_nulls(bare)}


def _without_nulls(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if not is_missing(part)}
    if isinstance(value, list | tuple):
        return [_without_nulls(part) for part in value]
    return value


def read_calls(turn: Mapping[str, object], place: str) -> tuple[str, tuple[Call, ...]]:
    """Return the calls of a turn, as JSON (an object with name and arguments, or a list of several) and each.

    Raises:
        ValueError: with the place of the turn.
    """
    read: list[tuple[Mapping[str, object], Call]] = []
    for name in CALLS:
        read += _listed(turn.get(name), f"{place}.{name}")
    if not read:
        return "", ()
    written: list[object] = [one for one, _ in read]
    try:
        text = to_text(written[0] if len(written) == 1 else written)
    except ValueError as error:
        raise ValueError(f"{place}.tool_calls {error}") from error
    return text, tuple(call for _, call in read)


def calls_of(content: object, place: str) -> tuple[Call, ...]:
    """Return the calls that a turn's whole content is (ShareGPT's function_call).

    Raises:
        ValueError: with the place of the turn.
    """
    found = json_of(content)
    if isinstance(found, str):
        raise ValueError(
            f"{place}, a call, must be JSON with name and arguments, got {short(found)}"
        )
    return tuple(call for _, call in _listed(found, place))


def _listed(value: object, place: str) -> list[tuple[Mapping[str, object], Call]]:
    found = json_of(value)
    if is_missing(found):
        return []
    if isinstance(found, Mapping):
        found = [found]
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ValueError(f"{place} must be a list of calls, got {short(found)}")
    return [_call(one, place) for one in found]


def _call(call: object, place: str) -> tuple[Mapping[str, object], Call]:
    """Return a call as it is written as text, and as it is told to a template."""
    call = json_of(call)
    inner = call.get("function") if isinstance(call, Mapping) else None
    function = call if is_missing(inner) else inner
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place}: a call must have a name and arguments, got {short(call)}")
    name = function["name"]
    if not name.strip():
        raise ValueError(f"{place}: a call must have a name and arguments, got {short(call)}")
    given = json_of(function.get("arguments", function.get("parameters")))
    nothing = is_missing(given) or (isinstance(given, str) and not given.strip())
    if not nothing and not isinstance(given, Mapping):
        raise ValueError(
            f"{place}: the arguments of {name} must be a JSON object, got {short(given)}"
        )
    try:
        arguments = to_text({} if nothing else given)
    except ValueError as error:
        raise ValueError(f"{place}: the arguments of {name} {error}") from error
    key = call.get("id") if isinstance(call, Mapping) else None
    return {"name": name, "arguments": given}, Call(
        name, arguments, key if isinstance(key, str) else ""
    )


def read_result(turn: Mapping[str, object], content: str) -> Result:
    """Return what a turn of a tool says."""
    key, name = turn.get("tool_call_id"), turn.get("name")
    return Result(
        content, key if isinstance(key, str) else "", name if isinstance(name, str) else ""
    )


def joined(one: ToolUse, other: ToolUse) -> ToolUse:
    """Return the results of calls that were made at once."""
    return replace(one, results=(*one.results, *other.results))


# --- given to a template --------------------------------------------------------------------------


def listed(tools: str) -> list[dict[str, object]]:
    """Return the functions of a list that `read_tools` returned."""
    found: list[dict[str, object]] = json.loads(tools) if tools else []
    return found


def calling(use: ToolUse, first: int, *, as_text: bool) -> dict[str, object]:
    """Return a turn with calls as templates take it; calls are numbered, since some templates want ids of nine letters.

    Args:
        use: The calls.
        first: Number of the first.
        as_text: Whether arguments are JSON, which some templates (DeepSeek's) join to their own text, or objects.
    """
    calls = [
        {
            "id": _id(first + at),
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": call.arguments if as_text else json.loads(call.arguments),
            },
        }
        for at, call in enumerate(use.calls)
    ]
    return {"role": "assistant", "content": use.said, "tool_calls": calls}


def answering(use: ToolUse, calls: Sequence[Call], first: int) -> list[dict[str, object]]:
    """Return the turns of tools, in the order of the calls that they answer: by id where the data has that."""
    places = {call.id: at for at, call in enumerate(calls) if call.id}
    by_call = [(places.get(result.id, at), result) for at, result in enumerate(use.results)]
    turns: list[dict[str, object]] = []
    for at, result in sorted(by_call, key=itemgetter(0)):
        call = calls[at] if at < len(calls) else None
        turn: dict[str, object] = {"role": "tool", "content": result.content}
        if call is not None:
            turn["tool_call_id"] = _id(first + at)
        if name := result.name or (call.name if call is not None else ""):
            turn["name"] = name
        turns.append(turn)
    return turns


def _id(number: int) -> str:
    return f"call{number:05d}"


def names(tools: str) -> list[str]:
    """Return the names of the functions of a list."""
    found = []
    for tool in listed(tools):
        function = tool["function"]
        assert isinstance(function, Mapping)
        found.append(str(function["name"]))
    return found


def is_called(call: Call, text: str) -> bool:
    """Return whether a text names the function and each of its arguments."""
    return all(word in text for word in (call.name, *json.loads(call.arguments)))


def is_printed_in(call: Call, text: str) -> bool:
    """Return whether a text holds the arguments of a call as Python prints them, and not as JSON."""
    printed = str(json.loads(call.arguments))
    return printed != call.arguments and printed in text


def is_told(result: Result, text: str) -> bool:
    """Return whether a text holds what a tool gave back, as it is or as a JSON string, white space aside."""
    squeezed = "".join(text.split())
    escaped = (json.dumps(result.content, ensure_ascii=plain)[1:-1] for plain in (False, True))
    return any("".join(one.split()) in squeezed for one in (result.content, *escaped))
