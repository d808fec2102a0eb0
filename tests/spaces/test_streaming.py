"""A rebuild is streamed: beside the model it takes a few stretches of it, whatever its size."""

import tracemalloc
from itertools import accumulate

import pytest
import torch

from fedloom.spaces.directions.directions import Directions
from fedloom.spaces.directions.stream import Distribution

MEGABYTE = 1 << 20


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distribution", ["rademacher", "popcount", "gaussian", "lowrank"])
def test_a_rebuild_takes_little_memory_beside_the_model(
    distribution: Distribution, kind: torch.dtype
) -> None:
    """Where 256 MB are allowed: 136 for low-rank sums, 24 else, of tensors and arrays alike."""
    shapes = {"a": torch.Size((4096, 4096)), "b": torch.Size((1 << 20,))}
    directions = Directions(shapes, distribution=distribution)
    base = torch.zeros(directions.numel, dtype=kind)
    c = torch.tensor([1e-3, -2e-3], dtype=torch.float64)
    out = torch.empty_like(base)
    directions.rebuild(base, c, out=out)  # loops are compiled once
    tracemalloc.start()
    directions.rebuild(base, c, out=out)
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        directions.rebuild(base, c, out=out)
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    tensors = max(accumulate((size for _, size in changes), initial=0))
    assert arrays + tensors <= (136 if distribution == "lowrank" else 24) * MEGABYTE, (
        arrays,
        tensors,
    )
