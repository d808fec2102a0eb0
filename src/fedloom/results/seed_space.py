"""The coefficients of a run in seed space at its end, in full."""

import dataclasses
import time
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.results.export import deliverables
from fedloom.run.loop import Run
from fedloom.run.parts import parts_of
from fedloom.run.session import Session
from fedloom.server.importance import SEED_SAMPLINGS
from fedloom.tracking.environment import phase_memory

_MODELS = 7
"""Models whose coefficients are written down."""


def seed_record(session: Session, run: Run[Any]) -> dict[str, Any]:
    """Return what seeds.json holds: the coefficients, the chances of the seeds, and what one rebuild takes."""
    models = deliverables(session, run)
    chances = _chances(session.recipe.algorithm, run.state)
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
        "probabilities": None if chances is None else _short(chances),
        "rebuild": {"seconds": round(seconds, 3), **memory},
    }


def _chances(algorithm: Any, state: Any) -> Tensor | None:
    """Return how likely each seed is drawn next, where that follows from what the state knows of each."""
    sampling = [part for part in parts_of(algorithm) if type(part) in SEED_SAMPLINGS.values()]
    known = [part for part in parts_of(state) if {"sizes", "draws"} <= _names(part)]
    if not sampling or not known:
        return None
    sizes, draws = attrgetter("sizes", "draws")(known[0])
    chances: Tensor | None = sampling[0].chances(sizes, draws)
    return chances


def _names(value: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(value)}


def _short(values: Tensor) -> list[float]:
    """Return the numbers with the digits that float32 has."""
    return [float(f"{value:.9g}") for value in values.to(torch.float64).tolist()]
