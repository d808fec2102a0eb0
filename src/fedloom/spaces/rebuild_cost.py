"""What a rebuild along all directions of a pool costs, and which distribution a pool has where none is asked for."""

import time

import torch

from fedloom.spaces.directions.directions import Directions
from fedloom.spaces.directions.stream import Distribution

MOST: dict[Distribution, float] = {"gaussian": 3e10, "rademacher": 1e12}
"""Weights times directions up to which a distribution is chosen, the first that fits; lowrank beyond. A rebuild then
takes half a minute at most on two threads with AVX-512, where these take 1.9 and 0.06 ns a weight and direction on one
thread, and lowrank 0.023. A rule of sizes, not of a machine's speed: all sides of a run choose alike."""
_SIDE, _NUM = 1024, 256
"""Of the matrix that a rebuild is timed on, and directions; 16 of costly distributions."""


def fitting_distribution(num_weights: int, num_seeds: int) -> Distribution:
    """Return the distribution of a pool over so many weights, where the recipe leaves the choice."""
    size = num_weights * num_seeds
    return next((name for name, most in MOST.items() if size <= most), "lowrank")


def rebuild_seconds(
    distribution: Distribution,
    num_weights: int,
    num_seeds: int,
    *,
    device: torch.device | None = None,
) -> float:
    """Return the seconds of a rebuild along all seeds here, extrapolated from a part of a second."""
    count = min(num_seeds, 16 if distribution in ("gaussian", "popcount") else _NUM)
    directions = Directions({"w": torch.Size((_SIDE, _SIDE))}, distribution=distribution)
    base = torch.zeros(directions.numel, device=device)
    out, coefficients = torch.empty_like(base), torch.full((count,), 1e-6, dtype=torch.float64)
    best = float("inf")
    for turn in range(4):  # the first of them compiles
        began = time.perf_counter()
        directions.rebuild(base, coefficients, out=out)[0].item()
        if turn:
            best = min(best, time.perf_counter() - began)
    return best * num_weights / directions.numel * num_seeds / count


def cost_in_words(distribution: Distribution, num_seeds: int, seconds: float) -> str:
    """Return a line for people."""
    taken = f"{seconds:.2g} s" if seconds < 10 else f"{seconds:,.0f} s"
    return f"{num_seeds:,} {distribution} directions: {taken}, once for all who share a download"
