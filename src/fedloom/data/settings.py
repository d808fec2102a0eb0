"""What the recipe section `data` says."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from fedloom.data.partition import Iid, Partition

Format = Literal[
    "auto",
    "prompt-completion",
    "messages",
    "alpaca",
    "dolly",
    "sharegpt",
    "squad",
    "gsm8k",
    "natural-instructions",
]
PromptName = Literal["chat", "alpaca", "vicuna", "plain"]
Truncate = Literal["answer", "prompt"]

BUILTIN = "builtin:polyglot"


@dataclass(frozen=True, slots=True)
class DataSettings:
    """Which text, in which form, and who holds it."""

    source: str = BUILTIN
    """`builtin:polyglot`, a Hub id, a .json/.jsonl/.csv/.parquet file, or a folder with one file per client."""
    config: str | Sequence[str] | None = None
    """Configuration of a Hub data set; of several, each becomes the label `file` of its rows. Like `split` and
    `revision` it belongs to a Hub id, so that a recipe takes the same data from a path instead."""
    split: str = "train"
    """Split of a Hub data set; every client's validation and test examples are cut from it."""
    revision: str | None = None
    """Commit, tag or branch of a Hub data set."""
    num_examples: int | None = None
    """How many rows to write (built-in; None is 6000), or to take at most, drawn with `seed`."""
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Keep rows whose column has one of these values."""
    format: Format = "auto"
    """How a row becomes a conversation; `auto` goes by the names of the columns."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The name a format knows -> the name in the file: `{prompt: question, completion: reply}`."""
    labels: Sequence[str] = ()
    """Columns kept for partition and report; empty keeps the known ones (language, task, category, client, ...)."""
    prompt: str | Mapping[str, str] = "chat"
    """`chat` (the tokenizer's own template), `alpaca`, `vicuna`, `plain`, or a mapping of roles to texts
    with `{content}` in them: `{user: "Q: {content}\\n", assistant: "A: {content}"}`."""
    system: str | None = None
    """System message of every conversation that has none."""
    max_length: int = 256
    """Tokens of one example, prompt and answer together."""
    truncate: Truncate = "answer"
    """What gives way where an example is longer: the end of the answer, or the beginning of the prompt.
    An example that keeps no token of its answer is dropped, and counted."""
    classes: Mapping[str, str] = field(default_factory=dict)
    """Of `local.objective: classification`: each answer that occurs -> the word the model decides for, such as
    `{alt.atheism: A, comp.graphics: B}`. Words must begin with different tokens."""
    packing: bool = False
    """Join training examples into rows of up to `max_length` tokens."""
    num_clients: int | None = None
    """None is 10, or as many as there are where the partition is natural."""
    partition: Partition = field(default_factory=Iid)
    """Which client holds which example."""
    tiers: Mapping[str, float] = field(default_factory=dict)
    """Share of the clients of each tier, such as `{phone: 0.5, desk: 0.5}`, drawn with `seed`: the `tier` of
    their profile, which settings by tier go by."""
    pooled: bool = False
    """Give all training examples to one more client, `pool`: the centralised baseline on the same split."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of training, validation and test examples of every client."""
    seed: int = 0
    """Of the built-in corpus, the sample and the partition."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        _check_names(self)
        _check_numbers(self)
        _check_fractions(self.fractions)
        if self.tiers and (
            min(self.tiers.values()) <= 0
            or not math.isclose(math.fsum(self.tiers.values()), 1.0, abs_tol=1e-6)
        ):
            raise ValueError(
                f"data.tiers must be shares above 0 that sum to 1, got {dict(self.tiers)}"
            )
        if self.classes and (len(self.classes) < 2 or not all(self.classes.values())):
            raise ValueError(
                f"data.classes must give at least two answers a word each, got {dict(self.classes)}"
            )
        for column, values in self.where.items():
            if isinstance(values, str) or not values:
                raise ValueError(f"data.where.{column} must be a list of values, got {values!r}")


def _check_names(settings: DataSettings) -> None:
    if not settings.source:
        raise ValueError(
            "data.source must name a file, a folder, a Hub id or builtin:polyglot, got ''"
        )
    if settings.source.startswith("builtin:") and settings.source != BUILTIN:
        raise ValueError(f"data.source must be {BUILTIN} to be built in, got {settings.source!r}")
    if settings.format not in get_args(Format):
        known = ", ".join(get_args(Format))
        raise ValueError(f"data.format must be one of {known}, got {settings.format!r}")
    if isinstance(settings.prompt, str) and settings.prompt not in get_args(PromptName):
        known = ", ".join(get_args(PromptName))
        raise ValueError(
            f"data.prompt must be one of {known}, or a mapping of roles to texts, got {settings.prompt!r}"
        )
    if settings.truncate not in get_args(Truncate):
        raise ValueError(f"data.truncate must be answer or prompt, got {settings.truncate!r}")


def _check_numbers(settings: DataSettings) -> None:
    if settings.max_length < 8:
        raise ValueError(f"data.max_length must be at least 8, got {settings.max_length}")
    if settings.num_clients is not None and settings.num_clients < 1:
        raise ValueError(f"data.num_clients must be at least 1, got {settings.num_clients}")
    if settings.num_examples is not None and settings.num_examples < 1:
        raise ValueError(f"data.num_examples must be at least 1, got {settings.num_examples}")


def _check_fractions(fractions: Sequence[float]) -> None:
    if len(fractions) != 3 or min(fractions) < 0 or fractions[0] <= 0:
        raise ValueError(
            "data.fractions must be three shares (train above 0, validation, test), "
            f"got {list(fractions)}"
        )
    if not math.isclose(math.fsum(fractions), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"data.fractions must sum to 1, got {list(fractions)} with sum {math.fsum(fractions):g}"
        )
