"""A small recipe over the random model: whole runs in a second or two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.recipe import build_recipe
from fedloom.run.recipe_settings import Recipe


def small_tree(model: Path, /, **sections: Any) -> dict[str, Any]:
    """Return a recipe of four clients and three rounds; `sections` are merged over it."""
    tree: dict[str, Any] = {
        "name": "small",
        "algorithm": "fedavg",
        "model": {"name": str(model)},
        "tune": {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}},
        "data": {
            "num_examples": 80,
            "num_clients": 4,
            "where": {"language": ["en"]},
            "max_length": 192,
        },
        "local": {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 2},
        "evaluation": {"every": 2, "max_new_tokens": 3},
        "run": {"rounds": 3, "samples": 2},
    }
    for name, section in sections.items():
        known = tree.get(name)
        # What is tuned is lora, or says itself what.
        inner = name == "tune" and "lora" in section
        if inner:
            tree[name] = {"lora": {**tree["tune"]["lora"], **section["lora"]}}
        elif name != "tune" and isinstance(known, dict) and isinstance(section, dict):
            tree[name] = {**known, **section}
        else:
            tree[name] = section
    return tree


@pytest.fixture(scope="session")
def small_recipe(tiny_folder: Path) -> Callable[..., Recipe]:
    """Return a maker of small recipes."""

    def make(**sections: Any) -> Recipe:
        return build_recipe(small_tree(tiny_folder, **sections))

    return make
