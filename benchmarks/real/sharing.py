"""Do pooled clusters lose to one model on a real one? Gemma 3 270M on XQuAD in four and in eight languages, two clients each.

    python benchmarks/real/sharing.py --data FOLDER [--model FILE] [--seeds 0,1,2] [--arms "four, ...;eight, ..."]
                                      [--part 0/2] [--table]

FOLDER holds XQuAD, a file a language. One model for all, each client alone, a model for each cluster that was found, clusters
that share as much as their uploads say, clusters of languages, and clusters by chance, with the same rows, cohorts and steps
at a seed. The task is one in all languages, so one model should win over clusters apart. Five to ten minutes of one core a run.
"""

import statistics
from collections.abc import Mapping
from typing import Any

from runs import MODELS, Line, Lines, Tree, beside, first, grid, last, main

from intervals import interval

BASE = "one model (FedAvg)"
ALONE = "each client alone"
LANGUAGES = {
    "four": ("ar", "de", "ru", "zh"),
    "eight": ("ar", "de", "en", "es", "ro", "ru", "tr", "zh"),
}
DTYPES = {"four": "float32", "eight": "bfloat16"}
METRICS = ("exact_match", "rouge1", "chrf")


def arm(source: str, model: str, languages: str, algorithm: Any, *, base: bool) -> Tree:
    """Return a recipe; the model before training is one for all, so that one arm measures it."""
    many = len(LANGUAGES[languages])
    run = {"rounds": 8, "samples": 0, "keep_checkpoints": 1}
    return {
        "model": {"name": model, "dtype": DTYPES[languages]},
        "algorithm": algorithm,
        "data": {
            "source": source,
            "where": {"file": [f"xquad.{language}" for language in LANGUAGES[languages]]},
            "num_clients": 2 * many,
            "num_examples": 200 * many,
            "partition": {"clusters": {"by": "file"}},
            "prompt": "plain",
            "max_length": 128,
            "truncate": "prompt",
            "fractions": [0.8, 0.0, 0.2],
        },
        "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
        "local": {"optimizer": "adamw", "lr": 1e-3, "steps": 4, "batch_size": 1},
        "evaluation": {
            "every": 0,
            "before": base,
            "validation": False,
            "max_examples": 160 // (2 * many),
            "max_new_tokens": 16,
            "metrics": list(METRICS),
        },
        "run": run,
    }


def arms(source: str, model: str) -> Mapping[str, Tree]:
    """Return the rows of the tables."""

    def clustered(pool: str, **more: Any) -> list[Any]:
        return [{"clustered": {"share": {"pool": pool}, "label": "file", **more}}, "fedavg"]

    made = {}
    for languages, names in LANGUAGES.items():
        told = {"given": {"by": "file"}}
        chance = {"random": {"num_clusters": len(names)}}
        of = {
            BASE: "fedavg",
            "clusters, pooled": clustered("on"),
            "clusters, apart": clustered("off"),
            "by language, apart": clustered("off", mode=told),
            "by chance, pooled": clustered("on", mode=chance),
            "by chance, apart": clustered("off", mode=chance),
            ALONE: "local",
        }
        for name, algorithm in of.items():
            made[f"{languages}, {name}"] = arm(
                source, model, languages, algorithm, base=name == BASE
            )
    return made


def page(lines: Lines) -> str:
    """Return a table for each number of languages."""
    parts = [
        "Test loss, nats a token of the answers; 160 test rows in all. Weights are in float32, of eight in bfloat16."
    ]
    for languages in LANGUAGES:
        mine = {
            name.partition(", ")[2]: runs
            for name, runs in lines.items()
            if name.startswith(languages)
        }
        if mine:
            base = [first(line) for line in mine.get(BASE, {}).values()]
            untrained = [f"Before training the loss is {interval(base)}."] if base else []
            parts += [f"## {languages.capitalize()} languages", *untrained, table(mine)]
    return "\n\n".join(parts)


def table(lines: Lines) -> str:
    """Return a row an arm."""
    base = lines.get(BASE, {})
    rows = []
    for name, runs in lines.items():
        if name == ALONE:
            continue
        ended = list(runs.values())
        rands = [line["server"][-1].get("server/adjusted_rand") for line in ended]
        rows.append(
            (
                name,
                str(len(runs)),
                interval([last(line) for line in ended]),
                "" if name == BASE or not base else f"{interval(beside(runs, base), 1)} %",
                *(interval([last(line, metric) for line in ended]) for metric in METRICS),
                "" if None in rands else f"{statistics.fmean(rands):.2f}",
                shares(ended),
            )
        )
    if alone := ends_alone(lines):
        worse = [
            100 * (found["loss"] / last(base[seed]) - 1)
            for seed, found in alone.items()
            if seed in base
        ]
        rows.append(
            (
                ALONE,
                str(len(alone)),
                interval([found["loss"] for found in alone.values()]),
                f"{interval(worse, 1)} %" if worse else "",
                *(interval([found[metric] for found in alone.values()]) for metric in METRICS),
                "",
                "",
            )
        )
    columns = (
        *("arm", "seeds", "loss", "beside one model, paired"),
        *("exact match", "F1 of words", "chrF", "adjusted Rand", "lambda, mean of rounds"),
    )
    return grid(columns, rows)


def ends_alone(lines: Lines) -> dict[int, dict[str, float]]:
    """Return how clients alone ended by seed: runs of their own, or the baseline of one model's run."""
    names = ("loss", *METRICS)
    found = {
        seed: {name: line["baselines"]["local"][f"test/{name}"] for name in names}
        for seed, line in lines.get(BASE, {}).items()
        if line["baselines"]
    }
    own = lines.get(ALONE, {})
    return found | {seed: {n: last(line, n) for n in names} for seed, line in own.items()}


def shares(lines: list[Line]) -> str:
    """Return the mean lambda of all rounds in which clusters were pooled."""
    told = [
        statistics.fmean(shown)
        for line in lines
        if (shown := [one["server/lambda"] for one in line["server"] if "server/lambda" in one])
    ]
    return f"{statistics.fmean(told):.3f}" if told else ""


if __name__ == "__main__":
    main(
        "sharing",
        "How much clusters share on a real model: XQuAD in four and in eight languages",
        arms,
        page,
        model=str(MODELS / "gemma3-270m.gguf"),
        data="xquad",
        doc=__doc__,
    )
