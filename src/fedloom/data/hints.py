"""What to write into the recipe where the columns of a row fit no format, or fit one by mistake."""

from collections.abc import Collection, Iterable, Mapping

from fedloom.data.cells import to_text
from fedloom.data.readers import Row
from fedloom.data.turns import is_talk, read_turns

_ASKED = ("prompt", "query", "question", "instruction", "input", "inputs", "problem", "source")
_ANSWERS = ("completion", "response", "answer", "output", "outputs", "reply", "target", "targets")
_PAIRS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))


def no_format(row: Row, formats: Iterable[tuple[str, Collection[str]]]) -> str:
    """Say that a row fits no format, and how it might be read."""
    known = "; ".join(f"{name} ({', '.join(needed)})" for name, needed in formats)
    return (
        f"{row.place}: no known format has the columns {_names(row)}; the formats are {known}; "
        f"name one in data.format and rename columns in data.columns{_remedy(row)}"
    )


def preference(row: Row) -> str:
    """Return a sentence where a row is a pair of a better and a worse answer; else nothing."""
    for better, worse in _PAIRS:
        if better in row.values and worse in row.values:
            return (
                f"{row.place}: {better} and {worse} are a pair of preference data, of which objective sft learns nothing: "
                f"set objective: dpo to learn which answer is preferred{_paired(row, better, worse)}; "
                f"to learn {better} alone, set data.columns={_chosen(row, better)}"
            )
    return ""


def desirability(row: Row, used: Collection[str]) -> str:
    """Return a sentence where a row says that its answer may be undesirable, and nothing asks for that; else nothing."""
    if "label" in used or not isinstance(row.values.get("label"), bool):
        return ""
    return (
        f"{row.place}: label is {to_text(row.values['label'])}, as in preference data (KTO), where the answers of false "
        "are bad ones: set objective: kto to learn from both, data.where={label: [true]} to learn the good ones alone, or "
        "data.labels=[label] to learn all"
    )


def _paired(row: Row, better: str, worse: str) -> str:
    """Return what to write into `data.columns` beside `objective: dpo`, if anything."""
    if (better, worse) == _PAIRS[0]:
        return ""
    asked = "" if "prompt" in row.values or "input" not in row.values else "prompt: input, "
    return f", with data.columns={{{asked}chosen: {better}, rejected: {worse}}}"


def _chosen(row: Row, better: str) -> str:
    """Return what to write into `data.columns` to learn the better answer alone."""
    try:
        turns = read_turns(row.values[better], better).turns
    except ValueError:
        turns = ()
    if turns and turns[0].role != "assistant":
        return f"{{messages: {better}}}"
    if "instruction" in row.values:
        return f"{{output: {better}}}"
    prompts = (
        name
        for name in ("conversations", "messages", *_ASKED)
        if name in row.values and not isinstance(row.values[name], Mapping)
    )
    asked = next(prompts, "...")
    return f"{{{'' if asked == 'prompt' else f'prompt: {asked}, '}completion: {better}}}"


def _remedy(row: Row) -> str:
    if talk := next((name for name, value in row.values.items() if is_talk(value)), None):
        return f", such as data.columns={{messages: {talk}}}"
    asked = [name for name in _ASKED if name in row.values]
    answers = [name for name in _ANSWERS if name in row.values]
    if len(asked) == 1 and len(answers) == 1:
        return f", such as data.columns={{prompt: {asked[0]}, completion: {answers[0]}}}"
    if "text" in row.values:
        return "; a text alone has no answer: part it into prompt and completion"
    return ""


def _names(row: Row) -> str:
    names = list(row.values)
    return (
        ", ".join(names)
        if len(names) <= 20
        else f"{', '.join(names[:20])} and {len(names) - 20} more"
    )
