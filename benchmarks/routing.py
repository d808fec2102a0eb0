"""New clients find the model of their language: accuracy by the number of examples they look at.

    python benchmarks/routing.py [--clients 20] [--seeds 1] [--rounds 12] [--overrides local.steps=10 ...]

A run of the recipe `polyglot_mixed` with clients of one language each, its clusters found; then clients that took no
part, of text from another seed, are routed by what they hold, with answers and by prompts alone. A route is right if
the clients of the chosen cluster speak the new one's language. A finished run is not repeated.
"""

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

from fedloom import experiment
from fedloom.core.randomness import derive
from fedloom.data.formats import Record, to_records
from fedloom.data.sources import take_rows
from fedloom.recipe import load_recipe
from fedloom.results.export import deliverables
from fedloom.results.route import Router
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import Session, build
from timing import write_page

SIZES = (1, 4, 16)


def trained(seed: int, rounds: int, overrides: Sequence[str], folder: Path) -> Session:
    """Return the session of a run, after it."""
    recipe = load_recipe(
        "polyglot_mixed",
        [
            "data.partition.clusters.share=1.0",
            f"data.seed={seed}",
            f"run.seed={seed}",
            f"run.rounds={rounds}",
            "run.baselines=[]",
            "run.samples=0",
            "evaluation.every=0",
            "evaluation.generate=false",
            "evaluation.max_examples=8",
            *overrides,
        ],
    )
    if not (folder / "summary.json").exists():
        experiment.run(recipe, folder)
    return build(recipe, folder)


def newcomers(session: Session, count: int, size: int) -> list[tuple[str, list[Record]]]:
    """Return the language and the examples of clients that took no part, the languages in turn."""
    data = replace(
        session.recipe.data, seed=derive(session.recipe.data.seed, "newcomers"), num_examples=3000
    )
    by_language: dict[str, list[Record]] = {}
    for record in to_records(take_rows(data).rows, data).records:
        by_language.setdefault(record.labels["language"], []).append(record)
    languages = sorted(by_language)
    found = []
    for at in range(count):
        language, start = languages[at % len(languages)], at // len(languages) * size
        found.append((language, by_language[language][start : start + size]))
    return found


def spoken(session: Session, router: Router) -> Mapping[str, str]:
    """Return the language that most clients of each model speak."""
    profiles = session.federation.profiles
    return {
        name: Counter(profiles[client]["language"] for client in clients).most_common(1)[0][0]
        for name, (_, clients) in router.models.items()
    }


def main() -> None:
    """Train, route and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--overrides", nargs="*", default=[])
    parser.add_argument("--runs", type=Path, default=Path("runs/routing-benchmark"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    right: Counter[tuple[str, int]] = Counter()
    lines = []
    for seed in range(arguments.seeds):
        folder = arguments.runs / f"{arguments.rounds}-{seed}"
        session = trained(seed, arguments.rounds, arguments.overrides, folder)
        router = Router(session, deliverables(session, last_run(session)))
        languages = spoken(session, router)
        lines.append(f"seed {seed}: {len(languages)} models, of {', '.join(languages.values())}")
        for language, records in newcomers(session, arguments.clients, max(SIZES)):
            prompts = [record.messages[-2].content for record in records]
            for size in SIZES:
                answered, asked = router.route(records[:size]), router.route(prompts[:size])
                right["with answers", size] += languages[answered.model] == language
                right["prompts alone", size] += languages[asked.model] == language
    total = arguments.clients * arguments.seeds
    lines += ["", f"| right of {total} | {' | '.join(f'{size} examples' for size in SIZES)} |"]
    lines.append("|---" * (len(SIZES) + 1) + "|")
    for kind in ("with answers", "prompts alone"):
        cells = (f"{right[kind, size]} ({right[kind, size] / total:.0%})" for size in SIZES)
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    text = "\n".join(lines)
    print(text)
    title = f"New clients routed: polyglot, six languages, {arguments.rounds} rounds"
    write_page("routing.md", title, text)


if __name__ == "__main__":
    main()
