"""Is a model for each cluster found better? Mean and worst language of `clustered`, beside what it could have been.

    python benchmarks/languages.py [--seeds 5] [--rounds 4] [--part 0/2] [--table]
                                    [--data FOLDER [--files xquad.ar,xquad.en,...]]

Languages in conflict: everybody asks in English, and each client wants its answers in its own language, so that no one
model can satisfy all; `--data FOLDER` takes a folder with a file a language in its place (XQuAD's eight, say). Every run
is a recipe through `fedloom.run` on the bundled model, with the same data and local training at a seed, so that
differences are paired: clusters found (`auto`), one model for all (`fedavg`), everybody alone (`local`), as many clusters
as there are languages drawn by chance (`random`), and clusters by language (`oracle`). What clusters share is
not estimated here (`benchmarks/pooling.py` is about that): each has a model of its own clients alone. A finished run is not repeated;
`--part i/n` takes every n-th run; `--table` only writes the table: means over the seeds with 95 % confidence intervals of
the mean (Student's t), the differences seed by seed.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

from fedloom import experiment
from fedloom.core.metrics import METRICS as TABLE
from fedloom.core.protocols import Metrics
from fedloom.data import polyglot
from fedloom.evaluation.measure import combine
from fedloom.recipe import build_recipe
from fedloom.rounds.loop import measure
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import Session, build
from intervals import interval
from shares import parser_of, share_of
from timing import write_page

SPOKEN = ("en", "de", "es", "pt", "sv")
TASKS = ("capital", "opposite", "category", "plural", "sequence")
MODES = ("auto", "oracle", "random", "fedavg", "local")
METRICS = ("exact_match", "chrf", "loss")


def write_conflict(file: Path, count: int, seed: int) -> None:
    """Write `count` examples a language: the same questions in English, answered in each language."""
    # Example i is one fact in every language, as a seed draws the same places of tables that correspond.
    asked, *_ = told = [polyglot.rows(count, seed, [language], TASKS) for language in SPOKEN]
    lines = [
        json.dumps({**answered, "prompt": question["prompt"]}, ensure_ascii=False)
        for answers in told
        for question, answered in zip(asked, answers, strict=True)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def algorithm_of(mode: str, by: str, count: int, seed: int) -> Any:
    """Return the layers of a mode; `by` is the label of the languages, of which there are `count`."""
    if mode in ("fedavg", "local"):
        return mode
    modes: dict[str, Any] = {
        "auto": "auto",
        "oracle": {"given": {"by": by}},
        "random": {"random": {"num_clusters": count, "seed": seed}},
    }
    apart = {"mode": modes[mode], "share": {"pool": "off"}, "label": by}
    return [{"clustered": apart}, "fedavg"]


def recipe_of(mode: str, seed: int, arguments: argparse.Namespace) -> Recipe:
    """Return the recipe of one run: the same for all modes but for the algorithm."""
    by = _by(arguments)
    data: dict[str, Any] = {"partition": {"clusters": {"by": by}}, "seed": seed}
    if arguments.data:
        files = sorted(path.stem for path in Path(arguments.data).glob("*.json*"))
        files = arguments.files.split(",") if arguments.files else files
        count = len(files)
        data |= {"source": arguments.data, "where": {"file": files}, "num_clients": 2 * count}
        data |= {"num_examples": 200 * count, "max_length": 128, "truncate": "prompt"}
        data |= {"fractions": [0.6, 0.0, 0.4]}
        local = {"lr": 3e-3, "steps": 6, "batch_size": 4}
    else:
        count, file = len(SPOKEN), arguments.runs / f"conflict-{seed}.jsonl"
        write_conflict(file, 180, seed)
        data |= {"source": str(file), "num_clients": 2 * count, "max_length": 48}
        data |= {"fractions": [0.5, 0.0, 0.5]}
        local = {"lr": 4e-3, "steps": 10, "batch_size": 8}
    tree = {
        "name": mode,
        "algorithm": algorithm_of(mode, by, count, seed),
        "data": data,
        "tune": {"lora": {"rank": 16, "alpha": 32, "targets": "all-linear"}},
        "local": {"optimizer": "adamw", **local},
        "evaluation": {"every": 0, "validation": False, "generate": False, "max_new_tokens": 12},
        "run": {"rounds": arguments.rounds, "seed": seed, "samples": 0, "keep_checkpoints": 1},
    }
    return build_recipe(tree)


def run(recipe: Recipe, by: str, folder: Path) -> None:
    """Run one recipe unless its result is there; answers are generated once, at the end."""
    result = folder / "result.json"
    if result.exists():
        return
    experiment.run(recipe, folder)
    asking = dataclasses.replace(recipe.evaluation, generate=True)
    session = build(dataclasses.replace(recipe, evaluation=asking), folder)
    done = last_run(session)
    measured, _ = measure(
        done,
        recipe.algorithm,
        session.engine,
        kind="test",
        population=session.engine.population(),
        clients=session.judges,
    )
    server = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    told = {
        "languages": by_language(session, measured, by),
        "found": {
            name: server[f"server/{name}"]
            for name in ("num_clusters", "adjusted_rand")
            if f"server/{name}" in server
        },
    }
    partial = result.with_suffix(".part")
    partial.write_text(json.dumps(told))
    partial.rename(result)


def by_language(session: Session, measured: Mapping[str, Metrics], by: str) -> dict[str, Metrics]:
    """Return the metrics of the clients of each language together; a client without one is its own."""
    found: dict[str, list[Metrics]] = {}
    for client, metrics in measured.items():
        label = session.federation.profiles[client].get(by, client)
        found.setdefault(label, []).append(metrics)
    return {language: combine(each) for language, each in sorted(found.items())}


def table(folder: Path, seeds: int) -> str:
    """Return the tables of all finished runs in Markdown."""
    found = {
        mode: {
            seed: json.loads(file.read_text())
            for seed in range(seeds)
            if (file := folder / mode / str(seed) / "result.json").exists()
        }
        for mode in MODES
    }
    ours = found["auto"]
    parts = []
    for metric in METRICS:
        columns = ("", "seeds", "mean", "worst language", "auto minus it, mean", "worst language")
        lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        for mode, results in found.items():
            if not results:
                continue
            both = {seed: _ends(result, metric) for seed, result in results.items()}
            cells = [interval(column) for column in zip(*both.values(), strict=True)]
            apart = [
                [ours_ - theirs for ours_, theirs in zip(_ends(ours[s], metric), ends, strict=True)]
                for s, ends in both.items()
                if s in ours and mode != "auto"
            ]
            cells += [interval(column) for column in zip(*apart, strict=True)] or ["", ""]
            lines.append(f"| {mode} | {len(results)} | {' | '.join(cells)} |")
        parts.append(
            f"{metric.replace('_', ' ')} ({TABLE.of(metric).better} is better)\n\n"
            + "\n".join(lines)
        )
    said = ", ".join(
        f"seed {seed}: {result['found']['num_clusters']:.0f} clusters, adjusted Rand index "
        f"{result['found']['adjusted_rand']:.3f}"
        for seed, result in ours.items()
    )
    return "\n\n".join([*parts, f"Found by auto: {said}."])


def _ends(result: Mapping[str, Any], metric: str) -> Sequence[float]:
    """Return the mean over the languages, and the worst of them."""
    values = [metrics[metric] for metrics in result["languages"].values()]
    return sum(values) / len(values), max(values, key=TABLE.of(metric).cost)


def _by(arguments: argparse.Namespace) -> str:
    return "file" if arguments.data else "language"


def main() -> None:
    """Run what is missing and write the table."""
    parser = parser_of(__doc__, "runs/languages-benchmark")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--data", help="a folder with a file a language, in the place of polyglot")
    parser.add_argument(
        "--files", help="of the folder, without what follows the last dot; else all"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = Path(arguments.data).stem if arguments.data else "conflict"
    spoken = f"-{arguments.files}" if arguments.files else ""
    folder = arguments.runs / f"{name}-{arguments.rounds}{spoken}"
    share = share_of(arguments)
    # Seed by seed, so that an interrupted benchmark has whole rows of fewer seeds.
    runs = [(mode, seed) for seed in range(arguments.seeds) for mode in arguments.modes.split(",")]
    for mode, seed in share.of(runs):
        print(f"{mode}, seed {seed}", flush=True)
        recipe = recipe_of(mode, seed, arguments)
        run(recipe, _by(arguments), folder / mode / str(seed))
    text = table(folder, arguments.seeds)
    print(text)
    if share.writes:
        said = f" ({arguments.files})" if arguments.files else ""
        write_page(
            "languages.md" if not arguments.data else f"languages_{name}.md",
            f"A model for each cluster: {name}{said}, {arguments.rounds} rounds",
            text,
        )


if __name__ == "__main__":
    main()
