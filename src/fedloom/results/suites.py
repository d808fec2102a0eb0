"""Public tests of what a run delivers, kept in its folder and compared item by item."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor, nn, tensor

from fedloom.core.files import write_atomic
from fedloom.evaluation.generation import Generation
from fedloom.models.positions import positions_of
from fedloom.results.statistics import wilson
from fedloom.rounds.reading import read_json
from fedloom.suites.items import Choice, Item, Program, Sum, read_items
from fedloom.suites.likelihood import Continuation, likelihoods
from fedloom.suites.protocols import SUITES, Protocol, cut, numbers_of
from fedloom.suites.sandbox import check_allowed, passes

FILE = "suites.json"
BASE = "base"
"""In the place of a model's name: the one before training."""
_BATCH = 16
_MOST = 2048
"""Tokens of a model that has no limit of its own."""


@dataclass(frozen=True)
class Asked:
    """A suite, and how it is asked."""

    suite: str
    file: Path
    limit: int | None = None
    """Of the items, the first so many."""
    shots: int | None = None
    """Worked examples; as the protocol has it if None."""
    examples: Path | None = None
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
        if shots and protocol.runs_code:
            raise ValueError(
                f"{protocol.title} has no worked examples: leave shots out, got {self.shots}"
            )
        if self.examples is not None and not shots:
            raise ValueError(
                f"examples has no effect without worked examples, of which {protocol.title} has none by itself: set shots too"
            )


@dataclass(frozen=True)
class SuiteResult:
    """What came of a suite."""

    suite: str
    model: str
    """Which of the run's models; `base` before training."""
    num: int
    scores: Mapping[str, float]
    """Shares from 0 to 1; the first is the one that is compared."""
    low: float
    high: float
    """Wilson's 95 % interval of the first."""
    right: Sequence[bool]
    """By item, of the first."""
    shots: int
    prompts_sha256: str
    """Of everything the model was shown: equal where the items, their order and the protocol are."""
    file_sha256: str
    seconds: float

    @property
    def score(self) -> float:
        """Return the score that is compared."""
        return next(iter(self.scores.values()))


def run_suite(
    model: nn.Module, tokenizer: Any, name: str, asked: Asked, *, share: bool = True
) -> SuiteResult:
    """Ask a model the items of a suite.

    Args:
        model: Answers; its weights and every random generator stay as they are.
        tokenizer: Its own.
        name: What the model is called.
        asked: Which items, and how.
        share: Whether beginnings that prompts share are read once.

    Raises:
        ValueError: where the file is not of the suite, or not the one that was meant.
    """
    protocol = SUITES[asked.suite]
    raw = asked.file.read_bytes() if asked.file.is_file() else b""
    found = hashlib.sha256(raw).hexdigest()
    if asked.sha256 is not None and found != asked.sha256.lower():
        raise ValueError(f"{asked.file} has the sha256 {found}, not {asked.sha256}")
    items, shots = _dealt(protocol, asked)
    prompts = [protocol.prompt(item, shots(item)) for item in items]
    began = time.perf_counter()
    if protocol.options is not None:
        right = _chosen(model, tokenizer, protocol, items, prompts, share=share)
    else:
        right = _written(model, tokenizer, protocol, items, prompts)
    seconds = time.perf_counter() - began
    first = next(iter(right.values()))
    return SuiteResult(
        asked.suite,
        name,
        len(items),
        {key: sum(each) / len(each) for key, each in right.items()},
        *wilson(sum(first), len(first)),
        first,
        protocol.shots if asked.shots is None else asked.shots,
        _sha256(prompts),
        found,
        seconds,
    )


def _dealt(protocol: Protocol, asked: Asked) -> tuple[list[Item], Callable[[Item], Sequence[Item]]]:
    """Return the items that are asked, and the worked examples before each."""
    count = protocol.shots if asked.shots is None else asked.shots
    items = read_items(asked.file, protocol.read)
    pool = read_items(asked.examples, protocol.read) if asked.examples else items
    by: dict[str, list[Item]] = {}
    for item in pool:
        by.setdefault(_subject(protocol, item), []).append(item)
    examples = {subject: own[:count] for subject, own in by.items()}
    if asked.examples is None and count:
        taken = {id(item) for own in examples.values() for item in own}
        items = [item for item in items if id(item) not in taken]
    if not items:
        raise ValueError(
            f"{asked.file} has no items left besides the {count} worked examples: give others, or fewer shots"
        )
    return items[: asked.limit], lambda item: examples.get(_subject(protocol, item), [])


def shown_sha256(asked: Asked) -> str:
    """Return the hash of everything a model is shown, without one: that of a result of the same questions.

    Raises:
        ValueError: where the file is not of the suite.
    """
    protocol = SUITES[asked.suite]
    items, shots = _dealt(protocol, asked)
    return _sha256([protocol.prompt(item, shots(item)) for item in items])


def _sha256(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(prompts).encode()).hexdigest()


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
) -> dict[str, list[bool]]:
    """Return by item whether the most likely option is right, as it is and by byte; of equals the first."""
    ways = _ways(protocol, items)
    asked = _continuations(prompts, ways)
    positions = most_tokens(model)
    found = iter(
        likelihoods(model, tokenizer, asked, max_length=positions, batch_size=_BATCH, share=share)
    )
    right: dict[str, list[bool]] = {"accuracy": [], "accuracy by byte": []}
    for item, texts in zip(items, ways, strict=True):
        assert isinstance(item, Choice)
        logprobs = [next(found).logprob for _ in texts]
        by_byte = [
            value / max(len(text.strip().encode()), 1)
            for value, text in zip(logprobs, texts, strict=True)
        ]
        for name, values in (("accuracy", logprobs), ("accuracy by byte", by_byte)):
            right[name].append(values.index(max(values)) == item.gold)
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
) -> dict[str, list[bool]]:
    """Return by item whether what the model writes is right."""
    positions = most_tokens(model)
    most = min(protocol.max_new_tokens, positions // 2)
    # Where there is no room, the beginning gives way.
    encoded = [_encoded(tokenizer, prompt)[most - positions :] for prompt in prompts]
    writing = Generation(tokenizer, most, _BATCH)
    answers = [cut(text, protocol.stops) for text in writing.answers(model, encoded)]
    if protocol.runs_code:
        return {"pass@1": [_passes(item, text) for item, text in zip(items, answers, strict=True)]}
    right: dict[str, list[bool]] = {
        "exact match behind ####": [],
        "exact match of the last number": [],
    }
    for item, text in zip(items, answers, strict=True):
        assert isinstance(item, Sum)
        gold = numbers_of(item.answer)[0]
        for name, said in zip(right, numbers_of(text), strict=True):
            right[name].append(said is not None and said == gold)
    return right


def _passes(item: Item, text: str) -> bool:
    assert isinstance(item, Program)
    return passes(f"{item.prompt}{text}\n", f"{item.tests}\ncheck({item.entry_point})\n").passed


def _encoded(tokenizer: Any, text: str) -> Tensor:
    return tensor(tokenizer(text, add_special_tokens=True)["input_ids"])


def most_tokens(model: nn.Module) -> int:
    """Return how many tokens a model is shown at most."""
    called: Any = model
    return min(positions_of(called.config) or _MOST, 2 * _MOST)


# --- kept and compared -------------------------------------------------------------------------------


def keep(folder: Path, results: Sequence[SuiteResult]) -> Path:
    """Write results into a run's folder, in the place of those of the same questions and model."""
    before = [r for r in read_results(folder) if not any(_same(r, own) for own in results)]
    file = folder / FILE
    lines = [asdict(result) for result in (*before, *results)]
    write_atomic(file, (json.dumps(lines, indent=1) + "\n").encode())
    return file


def read_results(folder: Path) -> list[SuiteResult]:
    """Return the results that a run's folder holds."""
    file = folder / FILE
    if not file.exists():
        return []
    try:
        return [SuiteResult(**line) for line in read_json(file, list, remedy="remove it")]
    except TypeError as error:
        raise ValueError(
            f"{file} is not as `fedloom suite` writes it ({error}): remove it"
        ) from error


def _same(a: SuiteResult, b: SuiteResult) -> bool:
    return (a.suite, a.model, a.prompts_sha256) == (b.suite, b.model, b.prompts_sha256)


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Return how likely so uneven a split of the items on which two models differ is by chance: McNemar's exact test, two-sided."""
    from scipy.stats import binomtest

    won = sum(a and not b for a, b in zip(one, other, strict=True))
    lost = sum(b and not a for a, b in zip(one, other, strict=True))
    return float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def compared(
    results: Sequence[SuiteResult], others: Mapping[str, Sequence[SuiteResult]]
) -> list[str]:
    """Return a sentence for each result and each other one that was asked the same.

    Args:
        results: Of one run.
        others: Of what they are compared with, by its name.
    """
    said = list[str]()
    for result in results:
        for name, known in others.items():
            for other in known:
                alike = (other.suite, other.prompts_sha256) == (result.suite, result.prompts_sha256)
                if not alike or other is result:
                    continue
                points = 100 * (result.score - other.score)
                said.append(
                    f"{SUITES[result.suite].title}: {result.model} {points:+.1f} points beside {name} on the same"
                    f" {result.num} items, McNemar's p {mcnemar(result.right, other.right):.2g}"
                )
    return said


def suites_table(results: Sequence[SuiteResult]) -> Table:
    """Return a row a result and score."""
    table = Table(title="Public tests", title_justify="left")
    for name in ("suite", "model", "score"):
        table.add_column(name)
    for name in ("items", "of 100", "95 %", "seconds"):
        table.add_column(name, justify="right")
    for result in results:
        for at, (score, value) in enumerate(result.scores.items()):
            first = (str(result.num), f"{100 * result.low:.1f} to {100 * result.high:.1f}")
            num, interval = ("", "") if at else first
            table.add_row(
                Text("" if at else SUITES[result.suite].title),
                Text("" if at else result.model),
                Text(score),
                num,
                f"{100 * value:.1f}",
                interval,
                "" if at else f"{result.seconds:.1f}",
            )
    return table
