"""What the recipe section `data` says."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fedloom.data.catalogue import ALL, CATALOGUE
from fedloom.data.partition import Iid, Natural, Partition

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
PromptName = Literal["auto", "chat", "alpaca", "vicuna", "plain"]
Truncate = Literal["answer", "prompt"]
SystemRole = Literal["fold", "refuse"]
ToolCalls = Literal["template", "text"]
Unit = Literal["characters", "tokens"]
Repeated = Literal["keep", "drop"]

_FRACTIONS = (0.8, 0.1, 0.1)
BUILTIN = "builtin:polyglot"
BUILTIN_PAIRS = "builtin:polyglot_pairs"
"""The same questions, each with its answer and one that rambles on."""


@dataclass(frozen=True, slots=True)
class Sample:
    """How many rows of each file are taken (a data set of the Hub is a file), drawn with `data.seed`."""

    share: float = 1.0
    """Of its rows, rounded down, (0, 1]."""
    at_least: int = 0
    """Rows taken where the share is fewer; all, where there are no more."""
    skip_below: int = 0
    """A file with fewer rows is left out."""

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn, or would have no effect."""
        if not 0 < self.share <= 1:
            raise ValueError(
                f"share of data.sample and held_out_sample must be in (0, 1], got {self.share}"
            )
        for name, value in (("at_least", self.at_least), ("skip_below", self.skip_below)):
            if value < 0:
                raise ValueError(
                    f"{name} of data.sample and held_out_sample must be at least 0, got {value}"
                )
        if self.at_least and self.share == 1:
            raise ValueError(
                f"at_least of data.sample and held_out_sample has no effect where share is 1, got {self.at_least}"
            )


@dataclass(frozen=True, slots=True)
class DataSettings:
    """Which text, in which form, and who holds it."""

    source: str = BUILTIN
    """`builtin:polyglot` (`builtin:polyglot_pairs` for objectives of preferences), a data set known by name (`dolly`), a
    Hub id, a .json/.jsonl/.csv/.tsv/.parquet file (.gz too), a folder with one file per client, or a function that returns rows
    (`my_lab.data:rows`)."""
    path: str | None = None
    """Where a data set known by name is, in the place of the Hub: a file of it, a folder of its splits, or of a file per
    client."""
    config: str | Sequence[str] | None = None
    """Configuration of a Hub data set; of several, each becomes the label `file` of its rows. Like `split` and
    `revision` it belongs to a Hub id, so that a recipe takes the same data from a path instead."""
    split: str = "train"
    """Split of a Hub data set; every client's validation and test examples are cut from it. `all`, of a data set known by
    name: each of its own splits for what it is there for."""
    revision: str | None = None
    """Commit, tag or branch of a Hub data set."""
    num_examples: int | None = None
    """How many rows to write (built-in; None is 6000), or to take at most, drawn with `seed`."""
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Keep rows whose column has one of these values, compared as text: `[no]` is no, and JSON's true is `true`."""
    shorter: Mapping[str, int] = field(default_factory=dict)
    """Keep rows whose column is shorter than this."""
    shorter_in: Unit = "characters"
    """What `shorter` counts: characters, or the tokens of the model."""
    sample: Sample = Sample()
    """How many of the rows that are left are taken."""
    held_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Rows whose column has one of these values are judged on and never learnt, by any client: they are the test
    examples of one more client, `held-out`, or of one each where the partition is natural."""
    held_out_sample: Sample = Sample()
    """How many of the rows held out are taken; `sample` is of the others."""
    format: Format = "auto"
    """How a row becomes a conversation; `auto` goes by the names of the columns."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The name a format knows -> the name in the file: `{prompt: question, completion: reply}`. No column may be
    displaced: one of the new name gets another too, as in `{completion: reply, old: completion}`."""
    labels: Sequence[str] = ()
    """Columns kept for partition and report; empty keeps the known ones (language, task, category, client, ...)."""
    prompt: str | Mapping[str, str] = "auto"
    """`auto` (`chat` where the tokenizer has a chat template, else `plain`), `chat` (the tokenizer's own template),
    `alpaca`, `vicuna`, `plain`, or a mapping of roles to texts with `{content}` in them: `{user: "Q: {content}\\n",
    assistant: "A: {content}"}`."""
    system: str | None = None
    """System message of every conversation that has none."""
    system_role: SystemRole = "fold"
    """Where the prompt has no place for a system message: it goes in front of the question, or its row is refused."""
    tool_calls: ToolCalls = "template"
    """How a chat template shows tools (column `tools`), calls of them and what these gave back: in its own way, and one
    that has none is refused; or as text, calls as JSON in answers and results as questions, as other prompts do."""
    max_length: int = 256
    """Tokens of one example, prompt and answer together."""
    truncate: Truncate = "answer"
    """What gives way where an example is longer: the end of the answer, or the beginning of the prompt: whole turns,
    oldest first, then the head of the question left (of its context first), all but a token; the system message and
    what the prompt writes around them stay. An example that keeps no token of its answer is dropped, and counted; where
    the prompt gives way, one whose last answer does not fit whole."""
    packing: bool = False
    """Join training examples into rows of up to `max_length` tokens."""
    num_clients: int | None = None
    """None is 10. A natural partition has as many clients as its label has values, and takes no number."""
    partition: Partition = field(default_factory=Iid)
    """Which client holds which example."""
    tiers: Mapping[str, float] = field(default_factory=dict)
    """Share of the clients of each tier, such as `{phone: 0.5, desk: 0.5}`, drawn with `seed`: the `tier` of
    their profile, which settings by tier go by."""
    duplicates: Repeated = "keep"
    """What becomes of a row whose conversation another row has: it is kept, or left out, so that no client learns what
    another does or any is measured on. The first stays; of rows that come in splits, one that is measured. Counted
    either way, and with it how much of the test data is learnt."""
    min_examples: int = 1
    """Training examples of a client, counted once all rows are read, cut to length and split. One with fewer is left
    out, neither learnt from nor measured, and reported; the others hold what they would hold beside it. Clients that
    are there to be measured only need none."""
    left_out: Sequence[str] = ()
    """Clients whose rows are not used: they neither train nor are measured. The others hold what they would hold beside
    them, and are drawn when they would be, as in a run in which these never answer."""
    unseen: float = 0.0
    """Share of the clients that never train, drawn with `seed` among those with training and test rows: what is measured of
    them is told apart, as `unseen/*`. Their training rows are for `evaluation.finetune` alone. Below 1; 0: none."""
    pooled: bool = False
    """Give all training examples to one more client, `pool`: the centralised baseline on the same split."""
    fractions: tuple[float, float, float] = _FRACTIONS
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
        if self.left_out and self.pooled:
            raise ValueError(
                "data.left_out is not for run.baselines centralised, which puts all rows in one place: leave one of them out"
            )
        _check_rows(self)
        _check_natural(self)
        _check_named(self)


def _check_named(settings: DataSettings) -> None:
    named = CATALOGUE.get(settings.source)
    if named is None and settings.path is not None:
        raise ValueError(
            f"data.path has no effect beside data.source {settings.source}, which says where rows are: only a data set known by"
            f" name has one ({', '.join(CATALOGUE)})"
        )
    if named is None:
        return
    if settings.path is None and not named.hub:
        raise ValueError(
            f"data.source {settings.source} is not on the Hub: set data.path to a file of it, as {named.elsewhere} has it"
        )
    if settings.split == ALL and tuple(settings.fractions) != _FRACTIONS:
        raise ValueError(
            f"data.fractions has no effect where data.split is all, got {list(settings.fractions)}: the data set's own splits"
            " are taken"
        )


def _check_natural(settings: DataSettings) -> None:
    natural, count = settings.partition, settings.num_clients
    if isinstance(natural, Natural) and count is not None:
        raise ValueError(
            f"data.num_clients is {count}, but a natural partition has a client for every value of {natural.by!r}: "
            f"leave it out, or take only the largest with data.partition={{natural: {{by: {natural.by}, largest: "
            f"{count}}}}}"
        )


def _check_rows(settings: DataSettings) -> None:
    for name, chosen in (("where", settings.where), ("held_out", settings.held_out)):
        for column, values in chosen.items():
            if isinstance(values, str) or not values:
                raise ValueError(f"data.{name}.{column} must be a list of values, got {values!r}")
    if settings.held_out_sample != Sample() and not settings.held_out:
        raise ValueError("data.held_out_sample has no effect without data.held_out")
    if settings.shorter_in not in get_args(Unit):
        raise ValueError(
            f"data.shorter_in must be characters or tokens, got {settings.shorter_in!r}"
        )
    if settings.shorter_in != "characters" and not settings.shorter:
        raise ValueError("data.shorter_in has no effect without data.shorter")
    for column, limit in settings.shorter.items():
        if limit < 1:
            raise ValueError(f"data.shorter.{column} must be at least 1, got {limit}")


def _check_names(settings: DataSettings) -> None:
    if not settings.source:
        raise ValueError(
            "data.source must name a file, a folder, a Hub id or builtin:polyglot, got ''"
        )
    if settings.source.startswith("builtin:") and settings.source not in (BUILTIN, BUILTIN_PAIRS):
        raise ValueError(
            f"data.source must be {BUILTIN} or {BUILTIN_PAIRS} to be built in, got {settings.source!r}"
        )
    if settings.format not in get_args(Format):
        known = ", ".join(get_args(Format))
        raise ValueError(f"data.format must be one of {known}, got {settings.format!r}")
    if isinstance(settings.prompt, str) and settings.prompt not in get_args(PromptName):
        known = ", ".join(get_args(PromptName))
        raise ValueError(
            f"data.prompt must be one of {known}, or a mapping of roles to texts, got {settings.prompt!r}"
        )
    if settings.duplicates not in get_args(Repeated):
        raise ValueError(f"data.duplicates must be keep or drop, got {settings.duplicates!r}")
    if settings.system_role not in get_args(SystemRole):
        raise ValueError(f"data.system_role must be fold or refuse, got {settings.system_role!r}")
    if settings.tool_calls not in get_args(ToolCalls):
        raise ValueError(f"data.tool_calls must be template or text, got {settings.tool_calls!r}")
    if settings.truncate not in get_args(Truncate):
        raise ValueError(f"data.truncate must be answer or prompt, got {settings.truncate!r}")


def _check_numbers(settings: DataSettings) -> None:
    if settings.max_length < 8:
        raise ValueError(f"data.max_length must be at least 8, got {settings.max_length}")
    if settings.num_clients is not None and settings.num_clients < 1:
        raise ValueError(f"data.num_clients must be at least 1, got {settings.num_clients}")
    if settings.min_examples < 1:
        raise ValueError(f"data.min_examples must be at least 1, got {settings.min_examples}")
    if not 0 <= settings.unseen < 1:
        raise ValueError(
            f"data.unseen must be a share of the clients from 0 to below 1, got {settings.unseen}"
        )
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


_WRITTEN = ("num_examples", "where")
"""Of the built-in corpus they say what is written; of other text they would leave rows out."""
_OF_ITS_DATA = (
    *(
        "config",
        "split",
        "revision",
        "num_examples",
        "where",
        "shorter",
        "sample",
        "held_out",
        "held_out_sample",
    ),
    *("format", "columns", "labels", "prompt", "num_clients", "partition", "path"),
)
"""What a recipe says of its own data, which a data set known by name brings itself."""


def unaccompanied(
    data: Mapping[str, Any], before: Mapping[str, Any], overridden: Collection[str]
) -> dict[str, Any]:
    """Return the section without what merely came along with a partition or a source that is no longer there.

    A natural partition takes no `num_clients` from a recipe whose own partition was replaced, a source of one's own
    nothing that says how the built-in corpus is written, and a data set known by name nothing that is of other data. What is
    overridden itself stays.

    Args:
        data: The section with overrides applied.
        before: The section as the recipe has it.
        overridden: The paths of all overrides, such as `data.partition`.
    """
    gone: list[str] = []
    if "data.partition" in overridden and _is_natural(data.get("partition")):
        gone.append("num_clients")
    if "data.source" in overridden and _is_builtin(before) and not _is_builtin(data):
        gone += _WRITTEN
    if "data.source" in overridden and data.get("source") in CATALOGUE:
        gone += _OF_ITS_DATA if data["source"] != before.get("source") else ()
    own = {path.split(".")[1] for path in overridden if path.startswith("data.")}
    return {name: value for name, value in data.items() if name not in gone or name in own}


def _is_natural(partition: object) -> bool:
    return partition == "natural" or (isinstance(partition, Mapping) and "natural" in partition)


def _is_builtin(data: Mapping[str, Any]) -> bool:
    return str(data.get("source", BUILTIN)).startswith("builtin:")
