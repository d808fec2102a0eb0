"""A learning rate for a shipped recipe, searched on validation data of one seed, and then beside the recipe's own on other seeds.

    python benchmarks/real/tune.py [--recipe smollm2] [--rounds 4] [--seeds 1,2,3,4,5] [--runs FOLDER]

Four rates, the recipe's among them, by successive halving; then four about the best of them. `fedloom bench` compares the one that
is found with the recipe's, where that is another, on seeds that the searches have not seen: other splits, other draws. A search or a
table that was stopped goes on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import runs  # noqa: F401 - it says where the other benchmarks' modules are
import torch
from rich.console import Console

import fedloom
from fedloom.benchmark.plan import as_override
from timing import write_page

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ABOUT = (0.5, 1.0, 1.5, 2.0)
"""Times the best of those."""


def search(
    recipe: str, rates: Sequence[float], settings: dict[str, Any], folder: Path, console: Console
) -> fedloom.Tuned:
    """Return what a search among these rates comes to."""
    found = fedloom.tune(
        recipe,
        {
            "description": f"Which learning rate suits {recipe}",
            "space": {"local.lr": list(rates)},
            "sampler": "grid",
            "successive_halving": {"eta": 2, "min_rounds": 1},
        },
        folder,
        overrides=[f"{path}={as_override(value)}" for path, value in settings.items()],
        console=console,
    )
    if found.recipe is None:
        raise SystemExit("no trial came to its end")
    return found


def shown(page: Path) -> str:
    """Return a page's text without its title, a level further down."""
    return page.read_text().partition("\n")[2].strip().replace("\n# ", "\n### ")


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seeds", default="1,2,3,4,5")
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
    first = search(said.recipe, RATES, settings, folder / "search", console)
    assert first.recipe is not None
    about = [float(f"{times * first.recipe.local.lr:g}") for times in ABOUT]
    found = search(said.recipe, about, settings, folder / "about", console)
    assert found.recipe is not None
    own, rate = fedloom.load_recipe(said.recipe).local.lr, found.recipe.local.lr
    parts = [
        f"## Rates far apart, on seed 0\n\n{shown(first.files['search.md'])}",
        f"## Rates about the best, on seed 0\n\n{shown(found.files['search.md'])}",
    ]
    if rate == own:
        parts.append(f"What was found is the recipe's own rate, {own:g}.")
    else:
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
        parts.append(
            f"## What was found, on seeds {said.seeds}\n\n{shown(table.files['table.md'])}"
        )
    text = "\n\n".join(parts)
    write_page(
        "real_tune.md",
        f"A learning rate found for the recipe {said.recipe}",
        text,
        packages=("torch", "transformers", "optuna", "fedloom"),
    )


if __name__ == "__main__":
    main()
