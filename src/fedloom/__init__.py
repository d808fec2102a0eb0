"""Fine-tune large language models across clients whose data never leaves them.

The names below are the public ones. They are loaded at first use, so that `import fedloom` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.algorithms import ALGORITHMS
    from fedloom.core.metrics import Metric
    from fedloom.core.protocols import (
        Algorithm,
        ClientError,
        ClientFailure,
        Done,
        Engine,
        Evaluate,
        Fit,
        Proximal,
        Reply,
        Round,
        Task,
        Trainer,
    )
    from fedloom.launch import run_recipe
    from fedloom.recipe import RecipeError, load_recipe
    from fedloom.run.recipe_settings import Recipe

__version__ = "0.1.0"

_HOMES = {
    "fedloom.algorithms": ("ALGORITHMS",),
    "fedloom.core.metrics": ("Metric",),
    "fedloom.core.protocols": (
        "ClientFailure",
        "Algorithm",
        "Done",
        "Engine",
        "Evaluate",
        "Fit",
        "Proximal",
        "ClientError",
        "Reply",
        "Round",
        "Task",
        "Trainer",
    ),
    "fedloom.launch": ("run_recipe",),
    "fedloom.recipe": ("RecipeError", "load_recipe"),
    "fedloom.run.recipe_settings": ("Recipe",),
}

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "ClientError",
    "ClientFailure",
    "Done",
    "Engine",
    "Evaluate",
    "Fit",
    "Metric",
    "Proximal",
    "Recipe",
    "RecipeError",
    "Reply",
    "Round",
    "Task",
    "Trainer",
    "__version__",
    "load_recipe",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return vars(import_module(home))[name]
    raise AttributeError(f"module 'fedloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
