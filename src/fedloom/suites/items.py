"""Items of public tests, whichever of their files they come from: questions with options, sums, programs, texts to write."""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedloom.data import readers
from fedloom.data.cells import short
from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import FORMATS, Record, to_records
from fedloom.suites.sources import Source

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """A question of which one option is right."""

    question: str
    options: tuple[str, ...]
    gold: int
    """Which option, from 0."""
    subject: str = ""
    """Of MMLU; empty elsewhere."""


@dataclass(frozen=True, slots=True)
class Sum:
    """A question whose answer ends in a number."""

    question: str
    answer: str
    """With its reasoning."""


@dataclass(frozen=True, slots=True)
class Program:
    """The beginning of a function, and tests of it."""

    prompt: str
    entry_point: str
    tests: str
    """Defines `check(candidate)`."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A question about a text, which has the answer in it."""

    text: str
    question: str
    answers: tuple[str, ...]
    """Each right."""


@dataclass(frozen=True, slots=True)
class Task:
    """A conversation whose last answer is to be written, shown as a run shows its clients theirs."""

    record: Record
    answers: tuple[str, ...]
    """Each right."""

    @property
    def text(self) -> str:
        """Return all before the answer, whatever template shows it."""
        return "\n\n".join(f"{m.role}: {m.content}" for m in self.record.messages[:-1])


LETTERS = "ABCDEFGHIJ"
"""What options are called where they are lettered."""
Item = Choice | Sum | Program | Passage | Task

_IT = "it"
"""In place of where a row is, which is said around what is wrong with it."""
_NUMBERED = re.compile(
    r"(?:Answer|Solution|Ending|Option)(\d):\s*(.*?)\s*(?=(?:Answer|Solution|Ending|Option)\d:|\n|$)",
    re.S,
)
_LETTERED = re.compile(r"(?:^|, | )([A-E])\. (.*?)(?=, [A-E]\. |$)", re.S)
_ASKED = re.compile(r"(?:question|Question|Qusetion):\s*(.*)", re.S)


def read_items(source: Source, read: Callable[[Row], Item]) -> list[Item]:
    """Return the items of a source.

    Raises:
        ValueError: naming the row that is no item.
    """
    items = list[Item]()
    for row in source.rows:
        try:
            items.append(_placed(read(row.values), row.place))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            reason = reason.removeprefix(f"{_IT}: ")
            known = ", ".join(map(str, row.values))
            raise ValueError(
                f"{row.place} is no item of this suite: {reason}; its columns are {known}"
            ) from error
    return items


def _placed(item: Item, place: str) -> Item:
    """Return an item that messages about it name by where its row is."""
    return Task(replace(item.record, place=place), item.answers) if isinstance(item, Task) else item


def choice(row: Row) -> Choice:
    """Return a question with options: of MMLU, ARC, OpenBookQA, BoolQ or HellaSwag, or an instruction that numbers its options."""
    if "instruction" in row:
        return _instructed(row)
    if "endings" in row:
        if "ctx_a" in row:
            text = f"{row['activity_label']}: {row['ctx_a']} {str(row['ctx_b']).capitalize()}"
        else:
            text = row["ctx"]
        return _choice(
            _hellaswag(text), [_hellaswag(each) for each in _listed(row["endings"])], row["label"]
        )
    if "passage" in row:
        answer = row["answer"] if "answer" in row else row["label"]
        right = str(answer).strip().lower() in ("true", "1", "yes")
        return Choice(f"{row['passage']}\nQuestion: {row['question']}?", ("no", "yes"), int(right))
    question = row["question_stem"] if "question_stem" in row else row["question"]
    if isinstance(question, Mapping):  # as the authors of ARC and OpenBookQA write it
        options, question = question["choices"], question["stem"]
    else:
        options = [row[at] for at in LETTERS if at in row] or _listed(row["choices"])
    labels = None
    if isinstance(options, Mapping):
        labels, options = list(options["label"]), list(options["text"])
    elif options and isinstance(options[0], Mapping):
        labels, options = ([each[name] for each in options] for name in ("label", "text"))
    gold = row["answerKey"] if "answerKey" in row else row["answer"]
    return _choice(
        question, options, gold, labels, str(row.get("subject") or row.get("class") or "")
    )


def gsm8k(row: Row) -> Sum:
    """Return a sum whose answer ends in `#### number`."""
    answer = str(row["answer"])
    if not re.search(r"#### -?[.,]*\d", answer):
        raise ValueError(f"its answer must end in `#### number`, got {answer[-40:]!r}")
    return Sum(str(row["question"]), answer)


def humaneval(row: Row) -> Program:
    """Return a function to write."""
    return Program(str(row["prompt"]), str(row["entry_point"]), str(row["test"]))


def passage(row: Row) -> Passage:
    """Return a question about a text, as SQuAD and XQuAD have it; of answers that are given twice one."""
    answers = row["answers"]
    found = answers["text"] if isinstance(answers, Mapping) else [one["text"] for one in answers]
    known = tuple(dict.fromkeys(str(answer).strip() for answer in found))
    if not any(known):
        raise ValueError("it has no answer")
    # XQuAD's files have a byte order mark in front of some paragraphs.
    return Passage(str(row["context"]).strip("\ufeff \n"), str(row["question"]).strip(), known)


def task(row: Row) -> Task:
    """Return what is to be written, of any row that `data.source` takes; of Natural Instructions with all answers."""
    found = to_records([readers.Row(row, _IT)], DataSettings(), unknown=_no_task).records
    if not found:
        raise ValueError("it has no answer")
    outputs = row.get("output") if "definition" in row else None
    more = outputs if isinstance(outputs, list | tuple) else ()
    return Task(
        found[0], tuple(dict.fromkeys([found[0].answer, *(str(one).strip() for one in more)]))
    )


def _no_task(_: readers.Row) -> str:
    forms = "; ".join(f"{name} ({', '.join(needed)})" for name, (needed, _, _) in FORMATS.items())
    return f"its columns are of no known format: call them in the file as one of these has them: {forms}"


def _instructed(row: Row) -> Choice:
    """Return a question as instruction data of adapter benchmarks has it: options numbered or lettered in the text."""
    text = f"{row['instruction']}\n{row.get('input') or ''}".strip()
    said = str(row["answer"] if row.get("answer") else row["output"]).strip()
    subject = str(row.get("class") or row.get("subject") or "")
    body = text.partition("Answer format:")[0].strip()
    if numbered := _NUMBERED.findall(body):
        number = re.search(r"(\d)\s*$", said)
        if number is None:
            raise ValueError(f"its answer names no option by number, got {said[:40]!r}")
        question = body[: body.index(re.search(r"(?:Answer|Solution|Ending|Option)\d:", body)[0])]  # type: ignore[index]
        asked = question.partition(": ")[2] or question
        numbers = [int(at) for at, _ in numbered]
        return _choice(
            asked.strip(), [option for _, option in numbered], numbers.index(int(number[1]))
        )
    asked_for = _ASKED.search(body)
    asked = asked_for[1] if asked_for else body
    if "Options:" in asked:
        question, _, options = asked.partition("Options:")
        lettered = _LETTERED.findall(options.strip())
        letter = re.search(r"\b([A-E])\.", said)
        if letter is None or not lettered:
            raise ValueError(f"its answer names no option by letter, got {said[:40]!r}")
        letters = [at for at, _ in lettered]
        return _choice(
            question.strip(),
            [option for _, option in lettered],
            letters.index(letter[1]),
            subject=subject,
        )
    if re.search(r"\b(true|false)$", said):
        return Choice(f"Question: {asked.strip()}", ("no", "yes"), int(said.endswith("true")))
    raise ValueError("its options are neither numbered, nor lettered, nor true and false")


def _choice(
    question: object,
    options: Sequence[object],
    gold: object,
    labels: Sequence[object] | None = None,
    subject: str = "",
) -> Choice:
    texts = tuple(str(option).strip() for option in options)
    if not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"it needs two to {len(LETTERS)} options, got {len(texts)}")
    known = [str(label) for label in labels] if labels else []
    said = str(gold).strip()
    if said in known:
        at = known.index(said)
    elif said.isdecimal():
        at = int(said)
    elif len(said) == 1 and said.isalpha():
        at = ord(said.upper()) - ord("A")
    else:
        raise ValueError(f"its answer must be a place or a letter, got {said!r}")
    if not 0 <= at < len(texts):
        raise ValueError(f"its answer {said!r} is none of its {len(texts)} options")
    return Choice(str(question).strip(), texts, at, subject.strip())


def _listed(value: Any) -> Any:
    """Return a list, of which a CSV has the text."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise ValueError(f"its options are no list of texts: {short(value)}") from error
    return value


def _hellaswag(text: object) -> str:
    """Return a text of HellaSwag without what its sources marked."""
    clean = re.sub(r"\[.*?\]", "", str(text).replace(" [title]", ". "))
    return clean.replace("  ", " ").strip()
