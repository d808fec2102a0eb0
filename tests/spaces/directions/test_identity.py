"""Sixteen million elements by their hash: threads, chunks, shards, kernels and the type of a model change none."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
import torch

from fedloom.spaces.directions import compiled, reference
from fedloom.spaces.directions.directions import Directions
from fedloom.spaces.directions.stream import Distribution, Draw, cut, keys_of, tag_of

MANY, SEED, K, TENSOR = 1 << 24, 2**63 + 77, 3, 5
HASHES: dict[Distribution, str] = {
    "gaussian": "e3fe430b336b5047d150a7c38c40fc3f",
    "rademacher": "7043dcc1f73e9f8c8efb707cbc072e6a",
    "popcount": "24d3f3ed95166508e799c3c7be0de17a",
}
"""Of direction 3 of tensor 5 under SEED, float32 little endian: part of what NOISE_VERSION 1 means."""


def draw_of(distribution: Distribution, start: int, stop: int) -> Draw:
    """Return the draw of some elements, which lie from 0."""
    return Draw(distribution, tag_of(distribution), keys_of(SEED, [K]), cut(TENSOR, start, stop, 0))


def hashed(kernels, distribution: Distribution, bounds: list[int]) -> str:
    """Return the hash of all elements, each stretch of them drawn by itself."""
    digest = hashlib.sha256()
    for start, stop in pairwise(bounds):
        out = np.full((1, stop - start), np.nan, "<f4")
        kernels.fill(draw_of(distribution, start, stop), out)
        digest.update(out.data)
    return digest.hexdigest()[:32]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("distribution", list(HASHES))
def test_many_elements_have_one_hash_on_any_number_of_threads(distribution: Distribution):
    for number in (1, 2, 16):
        torch.set_num_threads(number)
        assert hashed(compiled, distribution, [0, MANY]) == HASHES[distribution], (
            f"{number} threads"
        )


@pytest.mark.parametrize("distribution", list(HASHES))
def test_many_elements_have_one_hash_in_any_chunks(distribution: Distribution):
    """A chunk may begin and end anywhere, as a shard of the tensor does."""
    for bounds in ([0, MANY // 2, MANY], [0, 1, 4097, 99_991, 1_000_003, 9_999_999, MANY]):
        assert hashed(compiled, distribution, bounds) == HASHES[distribution], bounds


@pytest.mark.parametrize("distribution", list(HASHES))
def test_many_elements_have_one_hash_in_numpy(distribution: Distribution):
    assert hashed(reference, distribution, [*range(0, MANY, 99_991), MANY]) == HASHES[distribution]


INTERPRETED = f"""
import hashlib, numpy as np, torch
from fedloom.spaces.directions import compiled, cuda
from fedloom.spaces.directions.stream import BLOCK, Draw, cut, keys_of, tag_of

starts = np.arange(0, {MANY}, 256 * BLOCK)
size = len(starts) * BLOCK
pieces = cut({TENSOR}, starts, starts + BLOCK, np.arange(len(starts)) * BLOCK)
for distribution in {list(HASHES)}:
    draw = Draw(distribution, tag_of(distribution), keys_of({SEED}, [{K}]), pieces)
    ours, theirs = torch.empty(1, size), np.empty((1, size), np.float32)
    cuda.fill(draw, ours)
    compiled.fill(draw, theirs)
    hashes = (hashlib.sha256(some).hexdigest() for some in (ours.numpy().data, theirs.data))
    apart = np.abs(ours.numpy().view(np.int32).astype(np.int64) - theirs.view(np.int32)).max()
    print(distribution, *hashes, apart)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: pip install 'fedloom[cuda]'"
)
def test_blocks_from_all_over_many_elements_have_one_hash_in_triton():
    """Under Triton's slow interpreter: signs and counts to the bit, normal deviates within 4 ulp."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    found = {distribution: rest for distribution, *rest in map(str.split, done.stdout.splitlines())}
    assert found.keys() == HASHES.keys()
    assert int(found["gaussian"][2]) <= 4
    for distribution in ("rademacher", "popcount"):
        ours, theirs, apart = found[distribution]
        assert ours == theirs
        assert apart == "0"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("distribution", list(HASHES))
def test_a_model_of_any_type_sees_the_same_direction(distribution: Distribution, kind: torch.dtype):
    """The type of the model rounds a direction, and does not draw another."""
    shapes = {f"w{i}": torch.Size((7,)) for i in range(TENSOR)} | {"w": torch.Size((300, 1000))}
    directions = Directions(shapes, distribution=distribution, seed=SEED)
    nothing = torch.zeros(shapes["w"], dtype=kind)
    seen = directions.shift("w", nothing, [K], [1.0], out=torch.empty_like(nothing))
    drawn = np.empty((1, 300_000), np.float32)
    compiled.fill(draw_of(distribution, 0, 300_000), drawn)
    assert torch.equal(seen.flatten(), torch.from_numpy(drawn[0]).to(kind))
