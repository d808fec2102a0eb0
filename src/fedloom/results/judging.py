"""Which answers a run's selectors prefer: written or given, judged in both orders, by a majority of the models.

FedBiscuit's second step (arXiv:2407.03038): what selectors prefer among answers of the model itself is what it then learns from.
Deviations: of more than two answers every two are compared, and the best and the worst are the pair; where votes are even, the
mean log-odds decide.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from fedloom.core.files import write_atomic
from fedloom.core.protocols import Params
from fedloom.core.randomness import derive
from fedloom.data.cells import short
from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import Message, Record
from fedloom.data.jsontext import json_of
from fedloom.data.preparation import question
from fedloom.data.readers import Row, read_file, text_lines
from fedloom.data.turns import is_talk
from fedloom.evaluation.generation import Generation, Sampling, turn_ends
from fedloom.evaluation.scoring import evaluating
from fedloom.objectives.preference import mean, prefers
from fedloom.objectives.selector import Selector, SelectorScore
from fedloom.objectives.sft import DEFAULT
from fedloom.rounds.session import Session

CHUNK = 8
"""Prompts that are answered and judged before they are written down."""
_MOST = 8
"""Answers to a prompt: every two are compared."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be answered, and its answers where they are given."""

    text: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Writing:
    """How answers are written that are not given."""

    num_answers: int = 2
    """To each prompt."""
    temperature: float = 0.7
    """At which they are drawn."""
    max_new_tokens: int = 60
    """Longest answer."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to choose."""
        if not 2 <= self.num_answers <= _MOST:
            raise ValueError(f"--answers must be from 2 to {_MOST}, got {self.num_answers}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature must be above 0, got {self.temperature}")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")


@dataclass(frozen=True, slots=True)
class Judged:
    """Answers to a prompt, and what each model makes of every two of them."""

    prompt: str
    answers: Sequence[str]
    margins: Mapping[str, Sequence[float | None]]
    """By model, the log-odds of the earlier answer over the later one, of every two in order; None where there was no room."""

    @property
    def pair(self) -> tuple[str, str] | None:
        """Return the best and the worst answer; None where none is preferred."""
        votes, odds = [0.0] * len(self.answers), [0.0] * len(self.answers)
        for at, (one, other) in enumerate(combinations(range(len(self.answers)), 2)):
            found = [m for each in self.margins.values() if (m := each[at]) is not None]
            if not found:
                continue
            won, by = prefers(mean([prefers(margin, 0.0) for margin in found]), 0.5), mean(found)
            votes[one], votes[other] = votes[one] + won, votes[other] + 1 - won
            odds[one], odds[other] = odds[one] + by, odds[other] - by
        if len(self.answers) < 2:
            return None
        # Where answers are even the one that was first, so that nothing is left to chance.
        order = sorted(range(len(self.answers)), key=lambda at: (-votes[at], -odds[at], at))
        best, worst = order[0], order[-1]
        if (votes[best], odds[best]) == (votes[worst], odds[worst]):
            return None
        return self.answers[best], self.answers[worst]

    def to_json(self) -> dict[str, Any]:
        """Return a line of the file that holds it."""
        margins = {name: list(each) for name, each in self.margins.items()}
        return {"prompt": self.prompt, "answers": list(self.answers), "margins": margins}


def read_prompts(file: Path) -> list[Prompt]:
    """Return the prompts of a file: lines of a .txt, or rows with `prompt` and, if they are given, `answers`.

    Raises:
        ValueError: with file and row, where it holds none, or something else.
    """
    if not file.is_file():
        raise ValueError(f"--prompts {file} is no file, or does not exist")
    if file.suffix == ".txt":
        found = [Prompt(line) for line in text_lines(file)]
    else:
        found = [_prompt(row) for row in read_file(file)]
    if not found:
        raise ValueError(f"--prompts {file} holds no prompt")
    return found


def _prompt(row: Row) -> Prompt:
    if is_talk(row.values.get("prompt")):
        raise ValueError(
            f"{row.place}: prompt must be a text, which becomes one question, got turns of a conversation"
        )
    text = row.cell("prompt").strip()
    if not text:
        raise ValueError(
            f"{row.place}: a row must have the column prompt, and may have answers, got {', '.join(row.values)}"
        )
    value = json_of(row.values.get("answers"))
    if value is None or value == "":
        return Prompt(text)
    texts = [str(each).strip() for each in value] if isinstance(value, list) else []
    answers = tuple(dict.fromkeys(filter(None, texts)))
    if not 2 <= len(answers) <= _MOST or not all(isinstance(each, str) for each in value):  # type: ignore[attr-defined]  # a list by now
        raise ValueError(
            f"{row.place}: answers must be a list of 2 to {_MOST} texts that differ, got {short(value)}"
        )
    return Prompt(text, answers)


def judge(
    session: Session,
    models: Mapping[str, Params],
    prompts: Sequence[Prompt],
    writing: Writing,
    file: Path,
) -> Iterator[int]:
    """Answer and judge prompts, and add them to a file, which may hold the first of them; yield how many are done.

    Args:
        session: Of a run whose objective is the selector.
        models: What each selector tunes, by name.
        prompts: All of them, in their order.
        writing: Of answers that are not given.
        file: Where they are added, a line of JSON each.
    """
    # A chunk that was not written whole is done anew: its answers follow from what is asked together.
    lines = read_lines(file)
    done = len(lines) if len(lines) == len(prompts) else len(lines) // CHUNK * CHUNK
    if done < len(lines) or not file.exists():
        write_atomic(file, "".join(json.dumps(line) + "\n" for line in lines[:done]).encode())
    yield done
    while done < len(prompts):
        some = prompts[done : done + CHUNK]
        answers = _answered(session, some, replace(writing, seed=derive(writing.seed, done)))
        found = _judged(session, models, some, answers)
        with file.open("a", encoding="utf-8") as out:
            out.write("".join(json.dumps(each.to_json()) + "\n" for each in found))
        done += len(some)
        yield done


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file of judged prompts; the last one may be cut short."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def judged(file: Path) -> list[Judged]:
    """Return what a file of judged prompts holds."""
    return [Judged(**line) for line in read_lines(file)]


def _answered(session: Session, prompts: Sequence[Prompt], writing: Writing) -> list[list[str]]:
    """Return the answers to each prompt that differ: those given, else the untuned model's own."""
    found = [list(prompt.answers) for prompt in prompts]
    asked = [at for at, prompt in enumerate(prompts) if not prompt.answers]
    if not asked:
        return found
    recipe, tokenizer = session.recipe, session.base.tokenizer
    records = [_asked(prompts[at].text, recipe.data) for at in asked]
    examples = DEFAULT.examples(records, recipe.data, tokenizer).examples
    # A prompt without room for an answer has none.
    asked = [at for at, some in zip(asked, examples, strict=True) if some]
    rows = [each for some in examples for each in some]
    if not rows:
        return found
    session.space.load(session.space.start())
    model, size = session.space.model, recipe.evaluation.batch_size
    with session.evaluator.deployed(), evaluating(model):
        for number in range(writing.num_answers):
            sampling = Sampling(writing.temperature, derive(writing.seed, "answer", number))
            how = Generation(tokenizer, writing.max_new_tokens, size, sampling)
            texts = how.answers(
                model, [row.ids[: row.prompt_length] for row in rows], turn_ends(tokenizer, rows)
            )
            for at, text in zip(asked, texts, strict=True):
                if text and text not in found[at]:
                    found[at].append(text)
    return found


def _judged(
    session: Session,
    models: Mapping[str, Params],
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]],
) -> list[Judged]:
    """Return what each model makes of every two answers to a prompt."""
    recipe, selector = session.recipe, session.recipe.objective
    assert isinstance(selector, Selector)
    pairs = [
        (at, _pair(prompts[at].text, one, other, recipe.data))
        for at, texts in enumerate(answers)
        for one, other in combinations(texts, 2)
    ]
    records = [record for _, record in pairs]
    found = selector.examples(records, recipe.data, session.base.tokenizer).examples
    examples = [each for some in found for each in some]
    margins: dict[str, list[list[float | None]]] = {}
    for name, params in models.items():
        session.space.load(params)
        model = session.space.model
        with session.evaluator.deployed() as evaluator, evaluating(model):
            scores = iter(evaluator.scores(model, examples))
        of_model: list[list[float | None]] = [[] for _ in prompts]
        for (at, _), some in zip(pairs, found, strict=True):
            of_model[at].append(_margin(next(scores)) if some else None)
        margins[name] = of_model
    return [
        Judged(prompt.text, texts, {name: of_model[at] for name, of_model in margins.items()})
        for at, (prompt, texts) in enumerate(zip(prompts, answers, strict=True))
    ]


def _asked(prompt: str, settings: DataSettings) -> Record:
    """Return a conversation whose answer is still to be given, opened as clients' conversations are."""
    return question([Message("user", prompt)], settings, DEFAULT)


def _pair(prompt: str, one: str, other: str, settings: DataSettings) -> Record:
    record = _asked(prompt, settings)
    messages = (*record.messages[:-1], Message("assistant", one))
    return replace(record, messages=messages, answer=one, rejected=other)


def _margin(score: object) -> float | None:
    assert isinstance(score, SelectorScore)
    return score.margin if math.isfinite(score.margin) else None
