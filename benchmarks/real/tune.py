"""A learning rate for a shipped recipe, searched on validation data of one seed, and then beside the recipe's own on other seeds.

    python benchmarks/real/tune.py [--recipe smollm2] [--rounds 4] [--seeds 1,2,3] [--runs FOLDER]

Four rates, the recipe's among them, by successive halving; `fedloom bench` compares the one that is found with the recipe's, on
seeds that the search has not seen: other splits, other draws. A search or a table that was stopped goes on.
"""

import argparse
from pathlib import Path

import runs  # noqa: F401 - it says where the other benchmarks' modules are
import torch
from rich.console import Console

import fedloom
from fedloom.benchmark.plan import as_override
from timing import write_page

RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    said = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    settings = {
        "run.rounds": said.rounds,
        "run.samples": 0,
        "data.fractions": [0.7, 0.1, 0.2],
        "evaluation": {"every": 0, "validation": True, "generate": False},
    }
    folder = said.runs / "tune"
    found = fedloom.tune(
        said.recipe,
        {
            "description": f"Which learning rate suits {said.recipe}",
            "space": {"local.lr": list(RATES)},
            "sampler": "grid",
            "successive_halving": {"eta": 2, "min_rounds": 1},
        },
        folder / "search",
        overrides=[f"{path}={as_override(value)}" for path, value in settings.items()],
        console=console,
    )
    if found.recipe is None:
        raise SystemExit("no trial came to its end")
    own = fedloom.load_recipe(said.recipe).local.lr
    rate = found.recipe.local.lr
    plan = {
        "name": "rates",
        "recipe": said.recipe,
        "settings": settings,
        "methods": {f"the recipe's, {own:g}": None, f"found, {rate:g}": {"local.lr": rate}},
        "seeds": [int(seed) for seed in said.seeds.split(",")],
        "baselines": [],
        "metrics": ["test/loss", "test/token_accuracy"],
    }
    table = fedloom.bench(plan, folder / "rates", console=console)
    pages = (found.files["search.md"], table.files["table.md"])
    searched, compared = (
        page.read_text().partition("\n")[2].strip().replace("\n# ", "\n### ") for page in pages
    )
    seconds = sum(trial.seconds for trial in found.outcome.trials)
    text = (
        f"## The search, on seed 0\n\n{searched}\n\nIt took {seconds:.0f} s.\n\n"
        f"## What was found, on seeds {said.seeds}\n\n{compared}"
    )
    write_page(
        "real_tune.md",
        f"A learning rate found for the recipe {said.recipe}",
        text,
        packages=("torch", "transformers", "optuna", "fedloom"),
    )


if __name__ == "__main__":
    main()
