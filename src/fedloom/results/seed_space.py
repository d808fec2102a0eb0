"""The coefficients of a run in seed space at its end, in full."""

import time
from typing import Any

import torch
from torch import Tensor

from fedloom.core.description import describe
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.results.export import deliverables
from fedloom.rounds.loop import Run
from fedloom.rounds.session import Session
from fedloom.tracking.environment import phase_memory

_MODELS = 7
"""Models whose coefficients are written down."""


def seed_record(session: Session, run: Run[Any]) -> dict[str, Any]:
    """Return what seeds.json holds: the coefficients, the chances of the seeds, and what one rebuild takes."""
    models = deliverables(session, run)
    seeds = describe(session.recipe.algorithm, run.state).seeds
    params = next(iter(models.values()))[0]
    session.space.load(session.space.start())
    began = time.perf_counter()
    with phase_memory("rebuild") as memory:
        session.space.load(params)
    seconds = time.perf_counter() - began
    return {
        "num_seeds": params[COEFFICIENTS].numel(),
        "models": [
            {"name": name, "num_clients": len(clients), COEFFICIENTS: _short(params[COEFFICIENTS])}
            for name, (params, clients) in list(models.items())[:_MODELS]
        ],
        "probabilities": None if seeds is None else _short(seeds.chances),
        "rebuild": {"seconds": round(seconds, 3), **memory},
    }


def _short(values: Tensor) -> list[float]:
    """Return the numbers with the digits that float32 has."""
    return [float(f"{value:.9g}") for value in values.to(torch.float64).tolist()]
