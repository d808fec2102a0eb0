"""What a model is shown of an item, and how its answer is judged, suite by suite, as their papers' harnesses do."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedloom.evaluation.evaluation_settings import AnswerMetric
from fedloom.suites.items import (
    LETTERS,
    Choice,
    Item,
    Passage,
    Program,
    Sum,
    Task,
    choice,
    gsm8k,
    humaneval,
    passage,
    task,
)

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


@dataclass(frozen=True)
class Protocol:
    """A public test."""

    name: str
    title: str
    source: str
    """Paper and licence of the data."""
    read: Callable[..., Item]
    """From a row of its file to an item."""
    shots: int
    """Worked examples before the question, by default."""
    head: Callable[[Item], str]
    """What stands before everything."""
    question: Callable[[Item], str]
    """The item, up to where the answer begins."""
    answer: Callable[[Item], str]
    """Its right answer, as a worked example has it."""
    options: Callable[[Choice], Sequence[str]] | None = None
    """Ways to go on of which the most likely is chosen; None where the model writes."""
    stops: Sequence[str] = ()
    """Texts that end what the model writes."""
    max_new_tokens: int = 0
    by_subject: bool = False
    """Whether worked examples are of the question's subject."""
    runs_code: bool = False
    as_trained: bool = False
    """Whether items are shown as a run shows its clients theirs, in its template, in place of as plain text."""
    metrics: Sequence[AnswerMetric] | None = None
    """Of what is written, where it is scored as clients' answers are; None: those of the run."""
    hub: str = ""
    """Where it is on the Hub: a data set, its configuration and its split."""

    def prompt(self, item: Item, shots: Sequence[Item]) -> str:
        """Return what the model is shown."""
        worked = "".join(f"{self.question(shot)}{self.answer(shot)}\n\n" for shot in shots)
        return f"{self.head(item)}{worked}{self.question(item)}"


def numbers_of(text: str) -> tuple[str | None, str | None]:
    """Return the number behind `####`, and the last number of all, as GSM8K's harness compares them; None for none."""
    strict = _STRICT.search(text)
    found = [a or b for a, b in _FLEXIBLE.findall(text)]
    return (
        _bare(strict[1]) if strict else None,
        next((bare for each in reversed(found) if (bare := _bare(each))), None),
    )


def pass_at_k(num: int, correct: int, k: int) -> float:
    """Return the chance that one of k programs is right, of which `correct` of `num` are (Chen et al. 2021, equation 1)."""
    wrong = 1.0
    for at in range(num - correct + 1, num + 1):
        wrong *= 1 - k / at
    return 1.0 if num - correct < k else 1 - wrong


def _bare(number: str) -> str:
    return number.replace(",", "").replace("$", "").rstrip(".")


def _nothing(_: Item) -> str:
    return ""


def _as_choice(item: Item) -> Choice:
    assert isinstance(item, Choice)
    return item


def _spelled(item: Item) -> str:
    return f"Question: {_as_choice(item).question}\nAnswer:"


def _bare_question(item: Item) -> str:
    return _as_choice(item).question


def _text(item: Item) -> str:
    own = _as_choice(item)
    return f" {own.options[own.gold]}"


def _texts(item: Choice) -> Sequence[str]:
    return [f" {option}" for option in item.options]


def _lettered(item: Item) -> str:
    own = _as_choice(item)
    lines = [f"{LETTERS[at]}. {option}" for at, option in enumerate(own.options)]
    return "\n".join([own.question, *lines, "Answer:"])


def _letter(item: Item) -> str:
    return f" {LETTERS[_as_choice(item).gold]}"


def _letters(item: Choice) -> Sequence[str]:
    return [f" {LETTERS[at]}" for at in range(len(item.options))]


def _subject(item: Item) -> str:
    subject = _as_choice(item).subject.replace("_", " ")
    about = f" about {subject}" if subject else ""
    return f"The following are multiple choice questions (with answers){about}.\n\n"


def _boolq(item: Item) -> str:
    return f"{_as_choice(item).question}\nAnswer:"


def _sum(item: Item) -> str:
    assert isinstance(item, Sum)
    return f"Question: {item.question}\nAnswer:"


def _worked(item: Item) -> str:
    assert isinstance(item, Sum)
    return f" {item.answer}"


def _passage(item: Item) -> str:
    assert isinstance(item, Passage)
    return f"Context: {item.text}\n\nQuestion: {item.question}\n\nAnswer:"


def _found(item: Item) -> str:
    assert isinstance(item, Passage)
    return f" {item.answers[0]}"


def _conversation(item: Item) -> str:
    assert isinstance(item, Task)
    return item.text


def _program(item: Item) -> str:
    assert isinstance(item, Program)
    return item.prompt


SUITES: dict[str, Protocol] = {
    each.name: each
    for each in (
        Protocol(
            "gsm8k",
            "GSM8K",
            "Training Verifiers to Solve Math Word Problems. Cobbe et al. 2021, arXiv:2110.14168; MIT",
            gsm8k,
            5,
            _nothing,
            _sum,
            _worked,
            stops=("Question:", "</s>", "<|im_end|>"),
            max_new_tokens=256,
            hub="openai/gsm8k:main:test",
        ),
        Protocol(
            "mmlu",
            "MMLU",
            "Measuring Massive Multitask Language Understanding. Hendrycks et al. 2021, arXiv:2009.03300; MIT",
            choice,
            5,
            _subject,
            _lettered,
            _letter,
            options=_letters,
            by_subject=True,
            hub="cais/mmlu:all:test",
        ),
        Protocol(
            "humaneval",
            "HumanEval",
            "Evaluating Large Language Models Trained on Code. Chen et al. 2021, arXiv:2107.03374; MIT",
            humaneval,
            0,
            _nothing,
            _program,
            _nothing,
            stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
            max_new_tokens=256,
            runs_code=True,
            hub="openai/openai_humaneval",
        ),
        Protocol(
            "xquad",
            "XQuAD",
            "On the Cross-lingual Transferability of Monolingual Representations. Artetxe et al. 2020, arXiv:1910.11856; CC BY-SA",
            passage,
            0,
            _nothing,
            _passage,
            _found,
            stops=("\n",),
            max_new_tokens=64,
            hub="google/xquad:xquad.en:validation",
        ),
        Protocol(
            "natural_instructions",
            "Natural Instructions",
            "Super-NaturalInstructions. Wang et al. 2022, arXiv:2204.07705; Apache-2.0",
            task,
            0,
            _nothing,
            _conversation,
            _nothing,
            max_new_tokens=128,
            as_trained=True,
            metrics=("rouge_l_paper", "exact_match"),
        ),
        Protocol(
            "own",
            "own rows",
            "rows of one's own, in any form that data.source takes",
            task,
            0,
            _nothing,
            _conversation,
            _nothing,
            as_trained=True,
        ),
        *(
            Protocol(
                name, title, source, choice, 0, _nothing, spelled, _text, options=_texts, hub=hub
            )
            for name, title, source, spelled, hub in (
                (
                    "arc",
                    "ARC",
                    "Think you have Solved Question Answering? Clark et al. 2018, arXiv:1803.05457; CC BY-SA",
                    _spelled,
                    "allenai/ai2_arc:ARC-Challenge:test",
                ),
                (
                    "openbookqa",
                    "OpenBookQA",
                    "Can a Suit of Armor Conduct Electricity? Mihaylov et al. 2018, arXiv:1809.02789; Apache-2.0",
                    _bare_question,
                    "allenai/openbookqa:main:test",
                ),
                (
                    "boolq",
                    "BoolQ",
                    "BoolQ. Clark et al. 2019, arXiv:1905.10044; CC BY-SA",
                    _boolq,
                    "google/boolq::validation",
                ),
                (
                    "hellaswag",
                    "HellaSwag",
                    "HellaSwag. Zellers et al. 2019, arXiv:1905.07830; MIT",
                    _bare_question,
                    "Rowan/hellaswag::validation",
                ),
            )
        ),
    )
}
"""By what they are called on the command line."""
