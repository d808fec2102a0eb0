"""Fine-tune large language models across clients whose data never leaves them.

The names below are the public ones. They are loaded at first use, so that `import fedloom` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.algorithms import ALGORITHMS
    from fedloom.benchmark.bench import Bench, bench
    from fedloom.client.hf_trainer import LocalRound, hf_trainer
    from fedloom.client.setup import TrainerParts
    from fedloom.core.metrics import Metric
    from fedloom.core.protocols import (
        Algorithm,
        ClientError,
        ClientFailure,
        Done,
        Engine,
        Evaluate,
        Fit,
        Losses,
        Proximal,
        Reply,
        Round,
        Task,
        Trainer,
    )
    from fedloom.data.federation import Federation
    from fedloom.experiment import RoundLoop, run, session
    from fedloom.objectives.objective import Objective
    from fedloom.recipe import RecipeError, load_recipe
    from fedloom.result import Result, open_run
    from fedloom.results.suite_results import SuiteResult
    from fedloom.results.suites import Asked
    from fedloom.rounds.recipe_settings import Recipe
    from fedloom.rounds.training import Callback, FinishedRound
    from fedloom.search.tune import Tuned, tune

__version__ = "0.1.0"

_HOMES = {
    "fedloom.algorithms": ("ALGORITHMS",),
    "fedloom.benchmark.bench": ("Bench", "bench"),
    "fedloom.client.hf_trainer": ("LocalRound", "hf_trainer"),
    "fedloom.client.setup": ("TrainerParts",),
    "fedloom.core.metrics": ("Metric",),
    "fedloom.core.protocols": (
        "ClientFailure",
        "Algorithm",
        "Done",
        "Engine",
        "Evaluate",
        "Fit",
        "Losses",
        "Proximal",
        "ClientError",
        "Reply",
        "Round",
        "Task",
        "Trainer",
    ),
    "fedloom.data.federation": ("Federation",),
    "fedloom.experiment": ("RoundLoop", "run", "session"),
    "fedloom.objectives.objective": ("Objective",),
    "fedloom.recipe": ("RecipeError", "load_recipe"),
    "fedloom.result": ("Result", "open_run"),
    "fedloom.results.suite_results": ("SuiteResult",),
    "fedloom.results.suites": ("Asked",),
    "fedloom.rounds.recipe_settings": ("Recipe",),
    "fedloom.rounds.training": ("Callback", "FinishedRound"),
    "fedloom.search.tune": ("Tuned", "tune"),
}

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Asked",
    "Bench",
    "Callback",
    "ClientError",
    "ClientFailure",
    "Done",
    "Engine",
    "Evaluate",
    "Federation",
    "FinishedRound",
    "Fit",
    "LocalRound",
    "Losses",
    "Metric",
    "Objective",
    "Proximal",
    "Recipe",
    "RecipeError",
    "Reply",
    "Result",
    "Round",
    "RoundLoop",
    "SuiteResult",
    "Task",
    "Trainer",
    "TrainerParts",
    "Tuned",
    "__version__",
    "bench",
    "hf_trainer",
    "load_recipe",
    "open_run",
    "run",
    "session",
    "tune",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return vars(import_module(home))[name]
    raise AttributeError(f"module 'fedloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
