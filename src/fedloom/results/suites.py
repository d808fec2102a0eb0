"""Public tests of what a run delivers: a model is asked their items, as text or in the template of its run."""

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn, tensor

from fedloom.data.data_settings import DataSettings
from fedloom.data.tokens import Example, tokenise
from fedloom.evaluation.evaluation_settings import EvaluationSettings
from fedloom.evaluation.generation import Generation, turn_ends
from fedloom.evaluation.metrics import answer_metrics
from fedloom.models.positions import positions_of
from fedloom.results.suite_results import SuiteResult, interval
from fedloom.rounds.recipe_settings import Recipe
from fedloom.suites.items import Choice, Item, Passage, Program, Sum, Task, read_items
from fedloom.suites.likelihood import Continuation, likelihoods
from fedloom.suites.protocols import SUITES, Protocol, numbers_of
from fedloom.suites.sandbox import check_allowed, passes
from fedloom.suites.sources import Source
from fedloom.suites.squad import squad_exact, squad_f1

BASE = "base"
"""In the place of a model's name: the one before training."""
_BATCH = 16
_MOST = 2048
"""Tokens of a model that has no limit of its own."""
Scores = dict[str, list[float]]
"""By item, from 0 to 1, by what they are called."""


@dataclass(frozen=True)
class Asked:
    """A suite, and how it is asked."""

    suite: str
    file: str | Path | None = None
    """A file, a folder of files, or `OWNER/NAME[:CONFIG[:SPLIT]]` of the Hub; None: what the suite is on the Hub."""
    limit: int | None = None
    """Of the items, the first so many."""
    shots: int | None = None
    """Worked examples; as the protocol has it if None."""
    examples: str | Path | None = None
    """Where those are from; None: the first items of the file, which are not asked then."""
    sha256: str | None = None
    """What the file must be."""
    allow_code: bool = False

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise ValueError(f"a suite must be one of {', '.join(SUITES)}, got {self.suite!r}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"shots must be at least 0, got {self.shots}")
        protocol = SUITES[self.suite]
        if protocol.runs_code:
            check_allowed(allow_code=self.allow_code)
        shots = protocol.shots if self.shots is None else self.shots
        if shots and (protocol.runs_code or protocol.as_trained):
            raise ValueError(
                f"{protocol.title} has no worked examples: leave shots out, got {self.shots}"
            )
        if self.examples is not None and not shots:
            raise ValueError(
                f"examples has no effect without worked examples, of which {protocol.title} has none by itself: set shots too"
            )
        if self.file is None and not protocol.hub:
            raise ValueError(
                f"{self.suite} needs to be told where its items are: a file or folder, as in {self.suite}=test.jsonl"
            )

    @cached_property
    def source(self) -> Source:
        """Return where the items are."""
        return Source(str(self.file or SUITES[self.suite].hub))


def run_suite(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    asked: Asked,
    *,
    recipe: Recipe | None = None,
    share: bool = True,
) -> SuiteResult:
    """Ask a model the items of a suite.

    Args:
        model: Answers; its weights and every random generator stay as they are.
        tokenizer: Its own.
        name: What the model is called.
        asked: Which items, and how.
        recipe: Whose clients' template some suites are shown in; needed for those.
        share: Whether beginnings that prompts share are read once.

    Raises:
        ValueError: where the file is not of the suite, or not the one that was meant.
    """
    protocol = SUITES[asked.suite]
    items, shots = _dealt(protocol, asked)
    prompts = [protocol.prompt(item, shots(item)) for item in items]
    began = time.perf_counter()
    if protocol.options is not None:
        scores = _chosen(model, tokenizer, protocol, items, prompts, share=share)
    elif protocol.as_trained:
        if recipe is None:
            raise ValueError(f"{protocol.title} is shown in the template of a run: give its recipe")
        scores = _as_trained(model, tokenizer, protocol, items, recipe, share=share)
    else:
        scores = _written(model, tokenizer, protocol, items, prompts, share=share)
    seconds = time.perf_counter() - began
    first = next(iter(scores.values()))
    return SuiteResult(
        asked.suite,
        name,
        len(items),
        {key: sum(each) / len(each) for key, each in scores.items()},
        *interval(first),
        first,
        protocol.shots if asked.shots is None else asked.shots,
        _shown_sha256(protocol, items, prompts),
        asked.source.sha256,
        seconds,
    )


def _dealt(protocol: Protocol, asked: Asked) -> tuple[list[Item], Callable[[Item], Sequence[Item]]]:
    """Return the items that are asked, and the worked examples before each.

    Raises:
        ValueError: where the file is not of the suite or not the one that was meant, or there are too few worked examples.
    """
    found = asked.source.sha256
    if asked.sha256 is not None and found != asked.sha256.lower():
        raise ValueError(f"{asked.source.name} has the sha256 {found}, not {asked.sha256}")
    count = protocol.shots if asked.shots is None else asked.shots
    items = read_items(asked.source, protocol.read)
    pool = read_items(Source(str(asked.examples)), protocol.read) if asked.examples else items
    by: dict[str, list[Item]] = {}
    for item in pool:
        by.setdefault(_subject(protocol, item), []).append(item)
    examples = {subject: own[:count] for subject, own in by.items()}
    # Whoever is shown an answer is not asked for it.
    taken = {item for own in examples.values() for item in own}
    items = [item for item in items if item not in taken] if taken else items
    if not items:
        raise ValueError(
            f"{asked.source.name} has no items left besides the {count} worked examples: give others, or fewer shots"
        )
    items = items[: asked.limit]
    if asked.examples is not None:
        _check_examples(
            str(asked.examples), examples, {_subject(protocol, i) for i in items}, count
        )
    return items, lambda item: examples.get(_subject(protocol, item), [])


def shown_sha256(asked: Asked) -> str:
    """Return the hash of everything a model is shown, without one: that of a result of the same questions.

    Of suites in a run's template it is that of the questions, whatever the template.

    Raises:
        ValueError: where the file is not of the suite.
    """
    protocol = SUITES[asked.suite]
    items, shots = _dealt(protocol, asked)
    return _shown_sha256(protocol, items, [protocol.prompt(item, shots(item)) for item in items])


def _shown_sha256(protocol: Protocol, items: Sequence[Item], prompts: Sequence[str]) -> str:
    ways = [text for texts in _ways(protocol, items) for text in texts] if protocol.options else []
    return hashlib.sha256("\0".join([*prompts, *ways]).encode()).hexdigest()


def _check_examples(
    name: str, examples: Mapping[str, Sequence[Item]], subjects: Collection[str], count: int
) -> None:
    """Refuse worked examples that are fewer than asked for, of any subject there is."""
    for subject in sorted(subjects):
        if (there := len(examples.get(subject, ()))) < count:
            of = f" of the subject {subject!r}" if subject else ""
            raise ValueError(
                f"{name} has {there} worked examples{of}, and {count} are asked for: give others, or fewer shots"
            )


def _subject(protocol: Protocol, item: Item) -> str:
    return item.subject if protocol.by_subject and isinstance(item, Choice) else ""


def continuations(asked: Asked) -> tuple[list[Continuation], list[int], list[int]]:
    """Return the ways to go on that a suite of options compares, how many of each item, and which is right.

    Raises:
        ValueError: where the suite's answers are written.
    """
    protocol = SUITES[asked.suite]
    if protocol.options is None:
        raise ValueError(f"{protocol.title} has no options to choose from")
    items, shots = _dealt(protocol, asked)
    ways = _ways(protocol, items)
    prompts = [protocol.prompt(item, shots(item)) for item in items]
    gold = [item.gold for item in items if isinstance(item, Choice)]
    return _continuations(prompts, ways), [len(texts) for texts in ways], gold


def _ways(protocol: Protocol, items: Sequence[Item]) -> list[Sequence[str]]:
    assert protocol.options is not None
    return [protocol.options(item) for item in items if isinstance(item, Choice)]


def _continuations(prompts: Sequence[str], ways: Sequence[Sequence[str]]) -> list[Continuation]:
    pairs = zip(prompts, ways, strict=True)
    return [Continuation(prompt, text) for prompt, texts in pairs for text in texts]


def _chosen(
    model: nn.Module,
    tokenizer: Any,
    protocol: Protocol,
    items: Sequence[Item],
    prompts: Sequence[str],
    *,
    share: bool,
) -> Scores:
    """Return by item whether the most likely option is right, as it is and by byte; of equals the first."""
    ways = _ways(protocol, items)
    asked = _continuations(prompts, ways)
    positions = most_tokens(model)
    found = iter(
        likelihoods(model, tokenizer, asked, max_length=positions, batch_size=_BATCH, share=share)
    )
    right: Scores = {"accuracy": [], "accuracy by byte": []}
    for item, texts in zip(items, ways, strict=True):
        assert isinstance(item, Choice)
        logprobs = [next(found).logprob for _ in texts]
        by_byte = [
            value / max(len(text.strip().encode()), 1)
            for value, text in zip(logprobs, texts, strict=True)
        ]
        for name, values in (("accuracy", logprobs), ("accuracy by byte", by_byte)):
            right[name].append(float(values.index(max(values)) == item.gold))
    if all(len(text) == 2 for texts in ways for text in texts):
        # Letters are as long as one another.
        del right["accuracy by byte"]
    return right


def _written(
    model: nn.Module,
    tokenizer: Any,
    protocol: Protocol,
    items: Sequence[Item],
    prompts: Sequence[str],
    *,
    share: bool,
) -> Scores:
    """Return by item what the text is worth that the model writes behind a prompt."""
    positions = most_tokens(model)
    most = min(protocol.max_new_tokens, positions // 2)
    # Where there is no room, the beginning gives way.
    encoded = [_encoded(tokenizer, prompt)[most - positions :] for prompt in prompts]
    # A program stands or falls with the white space that its lines begin with.
    strip = not protocol.runs_code
    writing = Generation(tokenizer, most, _BATCH, stops=protocol.stops, strip=strip, share=share)
    answers = writing.answers(model, encoded)
    found: Scores = {}
    for item, text in zip(items, answers, strict=True):
        for name, value in _worth(item, text).items():
            found.setdefault(name, []).append(float(value))
    return found


def _worth(item: Item, text: str) -> dict[str, float]:
    """Return what an answer is worth, from 0 to 1, by the item's own measures."""
    match item:
        case Program():
            return {"pass@1": _passes(item, text)}
        case Passage():
            return {
                "exact match": squad_exact(text, item.answers),
                "F1 of words": squad_f1(text, item.answers),
            }
        case Sum():
            gold = numbers_of(item.answer)[0]
            strict, last = (said is not None and said == gold for said in numbers_of(text))
            return {"exact match behind ####": strict, "exact match of the last number": last}
    raise AssertionError(f"{type(item).__name__} is not answered behind a prompt")


def _as_trained(
    model: nn.Module,
    tokenizer: Any,
    protocol: Protocol,
    items: Sequence[Item],
    recipe: Recipe,
    *,
    share: bool,
) -> Scores:
    """Return by item what is written in the template that the run's clients have theirs in, by the metrics of their answers."""
    evaluation, positions = recipe.evaluation, most_tokens(model)
    most = min(protocol.max_new_tokens or evaluation.max_new_tokens, positions // 2)
    asked = [item for item in items if isinstance(item, Task)]
    examples = _examples(asked, tokenizer, recipe.data, positions, protocol.title)
    metrics = [
        metric
        for metric in answer_metrics(
            replace(evaluation, generate=True, metrics=protocol.metrics)
            if protocol.metrics
            else evaluation,
            written=True,
        )
        if metric.bounds == (0.0, 1.0)
    ] or answer_metrics(EvaluationSettings(), written=True)
    prompts = [example.ids[: example.prompt_length][most - positions :] for example in examples]
    writing = Generation(tokenizer, most, _BATCH, share=share)
    answers = writing.answers(model, prompts, turn_ends(tokenizer, examples))
    scores: Scores = {metric.title or metric.name: [] for metric in metrics}
    for item, text in zip(asked, answers, strict=True):
        for metric in metrics:
            assert metric.score is not None
            scores[metric.title or metric.name].append(float(metric.score(text, item.answers)))
    return scores


def _examples(
    asked: Sequence[Task], tokenizer: Any, data: DataSettings, positions: int, title: str
) -> list[Example]:
    """Return questions with their last answer in a run's template, in a model's positions."""
    shown = DataSettings(
        prompt=data.prompt,
        system=data.system,
        system_role=data.system_role,
        tool_calls=data.tool_calls,
        max_length=positions,
        truncate="prompt",
    )
    records = [item.record for item in asked]
    examples = [
        example
        for record, found in zip(records, tokenise(records, shown, tokenizer).examples, strict=True)
        for example in found[-1:]
        # Of several answers an earlier one may be left where the last has no room.
        if example.record and example.record.messages[-1] is record.messages[-1]
    ]
    if len(examples) < len(records):
        raise ValueError(
            f"{len(records) - len(examples)} items of {title} have no room in the model's {positions} positions,"
            " however much is cut from their questions: leave them out"
        )
    return examples


def _passes(item: Program, text: str) -> bool:
    return passes(f"{item.prompt}{text}\n", f"{item.tests}\ncheck({item.entry_point})\n").passed


def _encoded(tokenizer: Any, text: str) -> Tensor:
    return tensor(tokenizer(text, add_special_tokens=True)["input_ids"])


def most_tokens(model: nn.Module) -> int:
    """Return how many tokens a model is shown at most."""
    called: Any = model
    return min(positions_of(called.config) or _MOST, 2 * _MOST)
