"""Data sets known by name: where they are, what their columns are called, and whom their rows divide among.

Rows are read as the Hub or the authors' files have them, and their columns renamed to what the formats know. Nothing of the data
sets is in the package.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedloom.data.readers import Row

Names = Mapping[str, tuple[str, ...]]
"""What a column is called here -> what it is called in files; the first of them that is there counts."""
SPLITS = ("train", "validation", "test")
ALL = "all"
"""The `data.split` that reads all of a data set's own splits, each for what it is there for."""


@dataclass(frozen=True, slots=True)
class NamedSet:
    """A data set: where it is, and how its rows become those of a recipe."""

    about: str
    """What it is, in a few words."""
    hub: str
    """Its id on the Hub; empty: it is not there."""
    needs: Names
    """Columns without which a row is none of it."""
    may: Names = field(default_factory=dict)
    """Columns that a row may have beside them."""
    elsewhere: str = ""
    """Who has its files, where the Hub has them not."""
    label: str = ""
    """What clients differ by where a recipe names no partition, one for each value; empty: nothing."""
    pairs: bool = False
    """Whether rows are pairs of answers, for objectives of preferences."""
    config: str | None = None
    """Its configuration on the Hub."""
    revision: str | None = None
    """Its branch on the Hub."""
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train"})
    """Its own splits: train, validation and test -> what the Hub calls them."""
    before: Callable[[Row], Mapping[str, object]] | None = None
    """What a row holds besides its columns, where that is inside them or between them."""
    reads: tuple[str, ...] = ()
    """Columns that this is made of."""

    def shaped(self, row: Row, name: str) -> Row:
        """Return a row with its columns called as the formats know them.

        Raises:
            ValueError: where it has not the columns of this data set.
        """
        values = dict(row.values)
        if "conversations" in values or ("messages" in values and not self.pairs):
            return row  # turns as they were taken down
        if self.before is not None:
            values |= self.before(row)
        found: dict[str, object] = {}
        for column, names in {**self.needs, **self.may}.items():
            there = next((each for each in names if each in values), None)
            if there is not None:
                found[column] = values[there]
            elif column in self.needs:
                raise ValueError(
                    f"{row.place}: data.source {name} has the columns {_known(self.needs)}, got {', '.join(row.values)}; a"
                    " file of your own is named itself, in data.source"
                )
        renamed = {each for names in {**self.needs, **self.may}.values() for each in names}
        renamed.update(self.reads)
        return replace(row, values={k: v for k, v in values.items() if k not in renamed} | found)

    def local_splits(self, stems: Iterable[str]) -> dict[str, str]:
        """Return which files of a folder are this data set's own splits, by the splits; all of them, or none."""
        called = {split: {split, self.splits.get(split, split)} for split in SPLITS}
        called["validation"] |= {"valid", "dev", "val"}
        found = {split: stem for split in SPLITS for stem in sorted(stems) if stem in called[split]}
        return found if len(found) == len(list(stems)) else {}


def _known(names: Names) -> str:
    return ", ".join(" or ".join(each) for each in names.values())


# --- rows whose columns hold more than one thing --------------------------------------------------


def _tldr(row: Row) -> dict[str, object]:
    """Return a post with the summary an annotator chose, and the other one."""
    info, summaries, choice = (row.values.get(name) for name in ("info", "summaries", "choice"))
    texts = [one.get("text") for one in _listed(summaries) if isinstance(one, Mapping)]
    if not isinstance(info, Mapping) or len(texts) != 2 or choice not in (0, 1):
        return {}
    post = info.get("post") or info.get("article") or ""
    title = f"TITLE: {info['title']}\n" if info.get("title") else ""
    place = f"SUBREDDIT: r/{info['subreddit']}\n" if info.get("subreddit") else ""
    chosen, rejected = texts if choice == 0 else texts[::-1]
    return {"prompt": f"{place}{title}POST: {post}\nTL;DR:", "chosen": chosen, "rejected": rejected}


def _listed(value: object) -> list[Any]:
    if isinstance(value, Mapping):  # as tables hold a list of objects: an object of lists
        return [dict(zip(value, each, strict=False)) for each in zip(*value.values(), strict=False)]
    return list(value) if isinstance(value, list | tuple) else []


def _shp(row: Row) -> dict[str, object]:
    """Return a post with the comment its readers preferred, and the other one."""
    label = {"1": 1, "0": 0}.get(row.text("labels"))
    if label is None or "human_ref_A" not in row.values or "human_ref_B" not in row.values:
        return {}
    sides = [row.values["human_ref_A"], row.values["human_ref_B"]]
    chosen, rejected = sides if label else sides[::-1]
    domain = row.text("domain").rsplit("_", 1)[0]
    return {"chosen": chosen, "rejected": rejected, "domain": domain}


def _natural_instruction(row: Row) -> dict[str, object]:
    """Return the first of the answers, where a file has a list of them."""
    output = row.values.get("output")
    return {"output": output[0]} if isinstance(output, list) and output else {}


def _code_search(row: Row) -> dict[str, object]:
    """Return the documentation of a function behind its language, as FederatedScope-LLM asks for code."""
    asked = row.text("func_documentation_string") or row.text("docstring")
    return {"asked": f"{row.text('language')} {asked}".strip()} if asked else {}


# --- the table ------------------------------------------------------------------------------------

_ASKED: Names = {"instruction": ("instruction",), "output": ("output",)}
_ALPACA: Names = {"input": ("input",), "category": ("category",)}
_TRAIN_TEST = {"train": "train", "test": "test"}
_THREE = {"train": "train", "validation": "validation", "test": "test"}
_PAIR: Names = {"chosen": ("chosen",), "rejected": ("rejected",)}
_BENCH = "github.com/rui-ye/FedLLM-Bench (a JSON file of clients and their rows)"
_TOLD: Names = {"instruction": ("instruction", "prompt"), "output": ("response", "output")}
_CLIENT: Names = {
    "client": ("client", "client_id", "user", "user_id"),
    "language": ("language",),
    "input": ("input",),
}

CATALOGUE: Mapping[str, NamedSet] = {
    "alpaca": NamedSet(
        "52,002 instructions, written by a model", "tatsu-lab/alpaca", _ASKED, _ALPACA
    ),
    "alpaca_cleaned": NamedSet(
        "the same, mended by people", "yahma/alpaca-cleaned", _ASKED, _ALPACA
    ),
    "alpaca_gpt4": NamedSet("the same, answered by GPT-4", "vicgalle/alpaca-gpt4", _ASKED, _ALPACA),
    "dolly": NamedSet(
        "15,011 instructions of eight categories, written by people",
        "databricks/databricks-dolly-15k",
        {"instruction": ("instruction",), "output": ("response", "output")},
        {"input": ("context", "input"), "category": ("category",)},
        label="category",
    ),
    "codealpaca": NamedSet(
        "20,022 instructions to write code", "sahil2801/CodeAlpaca-20k", _ASKED, _ALPACA
    ),
    "codealpaca_languages": NamedSet(
        "instructions to write code in ten languages, each row's in its input (Fed-CodeAlpaca)",
        "",
        _ASKED,
        {"input": ("input",), "language": ("language", "input")},
        elsewhere="github.com/sahil280114/codealpaca (data/rosetta_alpaca.json)",
        label="language",
    ),
    "code_search_net": NamedSet(
        "functions of six languages and what they are documented to do",
        "code-search-net/code_search_net",
        {"instruction": ("asked",), "output": ("func_code_string", "code")},
        {"language": ("language",)},
        label="language",
        config="all",
        splits=_THREE,
        before=_code_search,
        reads=("func_documentation_string", "docstring"),
    ),
    "gsm8k": NamedSet(
        "7,473 problems of school mathematics, and 1,319 to test on",
        "openai/gsm8k",
        {"instruction": ("question", "instruction"), "output": ("answer", "output")},
        config="main",
        splits=_TRAIN_TEST,
    ),
    "natural_instructions": NamedSet(
        "1,600 tasks, each with its definition: a client a task",
        "Muennighoff/natural-instructions",
        {
            "instruction": ("definition", "instruction"),
            "input": ("inputs", "input"),
            "output": ("targets", "output"),
        },
        {"task": ("task", "task_name", "file"), "category": ("category",)},
        label="task",
        splits=_THREE,
        before=_natural_instruction,
    ),
    "aya": NamedSet(
        "204,000 prompts and answers in 65 languages, written by people",
        "CohereLabs/aya_dataset",
        {"instruction": ("inputs", "instruction"), "output": ("targets", "output")},
        {"language": ("language",)},
        label="language",
        splits=_TRAIN_TEST,
    ),
    "fed_aya": NamedSet(
        "Aya by annotator: 38 clients, eight languages",
        "",
        _TOLD,
        _CLIENT,
        elsewhere=_BENCH,
        label="client",
    ),
    "fed_chatbot_it": NamedSet(
        "chats of 237 people", "", _TOLD, _CLIENT, elsewhere=_BENCH, label="client"
    ),
    "fed_wildchat": NamedSet(
        "chats with ChatGPT, one turn (100 people) or several (50)",
        "",
        _TOLD,
        _CLIENT,
        elsewhere=_BENCH,
        label="client",
    ),
    "fed_chatbot_pa": NamedSet(
        "what 747 people preferred of two answers",
        "",
        {"prompt": ("prompt", "instruction", "question"), **_PAIR},
        _CLIENT,
        elsewhere=_BENCH,
        label="client",
        pairs=True,
    ),
    "tldr": NamedSet(
        "which of two summaries of a Reddit post an annotator preferred: a client an annotator",
        "openai/summarize_from_feedback",
        {"prompt": ("prompt",), **_PAIR},
        {"client": ("worker", "client")},
        label="client",
        pairs=True,
        config="comparisons",
        revision="refs/convert/parquet",
        splits={"train": "train", "validation": "validation"},
        before=_tldr,
        reads=("info", "summaries", "choice"),
    ),
    "shp": NamedSet(
        "which of two comments readers of 18 forums preferred",
        "stanfordnlp/SHP",
        {"prompt": ("history", "prompt"), **_PAIR},
        {"domain": ("domain",)},
        label="domain",
        pairs=True,
        splits=_THREE,
        before=_shp,
        reads=("human_ref_A", "human_ref_B", "labels"),
    ),
    "ultrafeedback": NamedSet(
        "61,135 pairs of answers, judged by a model",
        "HuggingFaceH4/ultrafeedback_binarized",
        {"prompt": ("prompt",), **_PAIR},
        pairs=True,
        splits={"train": "train_prefs", "test": "test_prefs"},
    ),
    "hh_rlhf": NamedSet(
        "160,800 pairs of dialogues, judged by people as helpful or harmless",
        "Anthropic/hh-rlhf",
        _PAIR,
        pairs=True,
        splits=_TRAIN_TEST,
    ),
}


def shaped(rows: Iterable[Row], name: str) -> Iterator[Row]:
    """Yield the rows of a data set known by name, with their columns called as the formats know them."""
    return (CATALOGUE[name].shaped(row, name) for row in rows)


def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recipe's tree with what goes with a data set known by name, where the recipe does not say it.

    That is a client for every value of its label, the Alpaca prompt of answers, and the objective dpo of pairs.
    """
    data = tree.get("data")
    named = CATALOGUE.get(str(data.get("source"))) if isinstance(data, Mapping) else None
    if named is None or not isinstance(data, Mapping):
        return tree
    found = dict(data)
    if named.label and "partition" not in data and data.get("num_clients") is None:
        found["partition"] = {"natural": {"by": named.label}}
    if named.pairs:
        return {"objective": "dpo", **tree, "data": found}
    return {**tree, "data": {"prompt": "alpaca", **found}}
