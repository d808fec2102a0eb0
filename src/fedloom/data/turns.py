"""Turns of a conversation: roles, parts of content, calls of tools, and marks of what is learnt."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fedloom.data.cells import PRINTED, is_missing, is_printed, short, to_text
from fedloom.data.jsontext import json_of
from fedloom.data.tools import CALLS, ToolUse, calls_of, joined, read_calls, read_result

Role = Literal["system", "user", "assistant"]

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
CALLERS: dict[str, Role] = {"function_call": "assistant", "tool_call": "assistant"}
"""Of turns that are calls and nothing else: a call is something the model says, its result something it is told."""
RESULTS: dict[str, Role] = {
    "tool": "user",
    "function": "user",
    "observation": "user",
    "ipython": "user",
    "tool_response": "user",
}
ROLES |= CALLERS | RESULTS

_PAIRS = (("role", "content"), ("from", "value"))
_MARKS = {"weight": True, "train": True, "training": True, "trainable": True, "loss": True}
_MARKS |= {"masked": False}
"""Keys of a turn that say whether it is learnt (OpenAI and Mistral, axolotl, Tinker, ms-swift, torchtune), and what
true means."""
_TEXT = ("text", "input_text", "output_text")
_MEDIA = (
    "image",
    "image_url",
    "input_image",
    "audio",
    "audio_url",
    "input_audio",
    "video",
    "video_url",
    "file",
)
_PARTIAL = ("train_detail", "mask", "loss_mask", "loss_scale", "loss_weight")
"""Keys that may ask for parts or shares of a turn."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says."""

    role: Role
    content: str
    learn: bool = True
    """Of an answer: whether it is a target."""
    use: ToolUse | None = None
    """Where it calls tools, or is what they gave back."""


@dataclass(frozen=True, slots=True)
class CellTurns:
    """The turns of one cell."""

    turns: tuple[Turn, ...] = ()
    ignored: frozenset[str] = frozenset()
    """Keys that nothing is made of, such as `messages[].name`."""
    missing: frozenset[str] = frozenset()
    """Keys that are null somewhere; of a null cell, none."""


def is_talk(value: object) -> bool:
    """Return whether a value is a turn, or a list that has some, or JSON of either.

    Objects that only look alike have other roles.
    """
    value = json_of(value)
    turns = value if isinstance(value, list | tuple) else [value]
    keys = [(turn, _keys(turn)) for turn in turns if isinstance(turn, Mapping)]
    return any(found and _called(turn, found) in ROLES for turn, found in keys)


def read_turns(value: object, column: str) -> CellTurns:
    """Return the turns of a cell: a list of them, one alone, or either as JSON.

    Raises:
        ValueError: a predicate of the row, beginning with the column.
    """
    if is_missing(value):
        return CellTurns()
    found = json_of(value)
    if isinstance(found, Mapping) and _keys(found):
        found = [found]
    if not isinstance(found, list | tuple):
        hint = f"; such texts {PRINTED}" if is_printed(found) else ""
        raise ValueError(f"{column} must be a list of turns, got {short(found)}{hint}")
    turns: list[Turn] = []
    ignored: set[str] = set()
    missing: set[str] = set()
    for at, turn in enumerate(found):
        _add_(turns, _turn(turn, f"{column}[{at}]", column, ignored, missing))
    return CellTurns(tuple(turns), frozenset(ignored), frozenset(missing))


def joined_parts(value: object) -> object:
    """Return content that comes in parts (`[{type: text, text: ...}]`) as one text; other values as they are.

    Raises:
        ValueError: a predicate, where a part is no text.
    """
    if not isinstance(value, list | tuple) or not value:
        return value
    types = [part.get("type") if isinstance(part, Mapping) else None for part in value]
    if not any(kind in (*_TEXT, *_MEDIA) for kind in types):
        return value
    texts = []
    for part, kind in zip(value, types, strict=True):
        if kind not in _TEXT:
            raise ValueError(f"holds a part of type {short(kind)}; only text is learnt")
        texts.append(to_text(part.get("text", part.get("content"))))
    return "\n".join(text for text in texts if text)


def _keys(turn: Mapping[str, object]) -> tuple[str, str] | None:
    """Return what a turn calls who speaks and what is said."""
    for role, content in _PAIRS:
        if isinstance(turn.get(role), str) and (
            content in turn or any(not is_missing(turn.get(name)) for name in CALLS)
        ):
            return role, content
    return None


def _called(turn: Mapping[str, object], keys: tuple[str, str]) -> str:
    return str(turn[keys[0]]).strip().casefold()


def _turn(turn: object, place: str, column: str, ignored: set[str], missing: set[str]) -> Turn:
    keys = _keys(turn) if isinstance(turn, Mapping) else None
    if keys is None:
        raise ValueError(
            f"{place}, a turn, must have role and content (or from and value), got {short(turn)}"
        )
    assert isinstance(turn, Mapping)
    role, content = keys
    called = _called(turn, keys)
    if called not in ROLES:
        known = ", ".join(ROLES)
        raise ValueError(f"{place}.{role} must be one of {known}, got {short(turn[role])}")
    who = ROLES[called]
    try:
        text = to_text(joined_parts(turn.get(content))).strip()
    except ValueError as error:
        raise ValueError(f"{place}.{content} {error}") from error
    written, use = _use(turn, text, called, place, content)
    if not written and is_missing(turn.get(content)):
        missing.add(f"{column}[].{content}")
    learn = _learnt(turn, place)
    used = {role, content, *_MARKS, *(CALLS if written else ())}
    used |= {"tool_call_id", "name"} if use is not None and use.results else set()
    others = {name for name in turn if name not in used and not _nothing(turn[name])}
    ignored |= {f"{column}[].{name}" for name in others}
    if learn and who != "assistant":
        marks = (name for name in _MARKS if not is_missing(turn.get(name)))
        ignored |= {f"{column}[].{name} of a {who} turn" for name in marks}
    text = "\n".join(part for part in (text, written) if part)
    return Turn(who, text, learn is not False or who != "assistant", use)


def _use(
    turn: Mapping[str, object], text: str, called: str, place: str, content: str
) -> tuple[str, ToolUse | None]:
    """Return the calls of a turn that stand beside its content, as text, and what it has to do with tools."""
    if called in RESULTS:
        return "", ToolUse(results=(read_result(turn, text),))
    if ROLES[called] != "assistant":
        return "", None
    written, calls = read_calls(turn, place)
    if called in CALLERS and not written and text:
        return "", ToolUse(calls=calls_of(text, f"{place}.{content}"))
    return written, ToolUse(text, calls) if calls else None


def _nothing(value: object) -> bool:
    return is_missing(value) or (isinstance(value, list | tuple) and not value)


def _add_(turns: list[Turn], turn: Turn) -> None:
    """Append a turn; results of calls made at once are told in one, since most templates let sides alternate."""
    last = turns[-1].use if turns else None
    if turn.use is not None and turn.use.results and last is not None and last.results:
        content = f"{turns[-1].content}\n{turn.content}"
        turns[-1] = replace(turns[-1], content=content, use=joined(last, turn.use))
    else:
        turns.append(turn)


# --- what is learnt -----------------------------------------------------------------------------


def _learnt(turn: Mapping[str, object], place: str) -> bool | None:
    """Return whether a turn is marked to be learnt; None where nothing is said."""
    for name in _PARTIAL:
        if not is_missing(turn.get(name)):
            raise ValueError(
                f"{place} has {name}, but a turn is learnt whole or not at all: say so by weight, 1 or 0"
            )
    weights = {name: turn[name] for name in _MARKS if not is_missing(turn.get(name))}
    marks = set()
    for name, value in weights.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise ValueError(f"{place}.{name} must be 0 or 1, true or false, got {short(value)}")
        marks.add(bool(value) is _MARKS[name])
    if len(marks) > 1:
        raise ValueError(
            f"{place} says both that it is learnt and that it is not: {short(weights)}"
        )
    return marks.pop() if marks else None
