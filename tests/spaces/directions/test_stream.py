"""The stream is Philox4x32-10, and who draws an element, with what and in how many parts, does not show."""

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from fedloom.spaces.directions import compiled, reference
from fedloom.spaces.directions.stream import BLOCK, Distribution, Draw, cut, keys_of, philox, tag_of

DISTRIBUTIONS: list[Distribution] = ["gaussian", "rademacher", "popcount"]
ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], words: str
):
    drawn = philox(np.array(counter, np.uint32), key)
    assert " ".join(f"{word:08x}" for word in drawn) == words


def scattered() -> np.ndarray:
    """Return pieces of three tensors that begin and end anywhere: 9000 + 1500 + 1000 elements."""
    parts = (cut(0, 0, 9000, 0), cut(3, 5, 1505, 9000), cut(2**31, 2**40 - 500, 2**40 + 500, 10500))
    return np.concatenate(parts)


def draw_of(distribution: Distribution, num: int = 7) -> Draw:
    return Draw(distribution, tag_of(distribution), keys_of(2**63 + 77, range(num)), scattered())


def filled(kernels, draw: Draw) -> np.ndarray:
    out = np.full((len(draw.keys), 11500), np.nan, np.float32)
    kernels.fill(draw, out)
    return out


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_numba_draws_the_bits_of_numpy(distribution: Distribution):
    draw = draw_of(distribution)
    np.testing.assert_array_equal(filled(compiled, draw), filled(reference, draw))


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_numba_adds_to_the_bits_of_numpy(distribution: Distribution, kind, scale: float):
    draw, noise = draw_of(distribution), np.random.default_rng(0)
    base, by = noise.normal(size=11500).astype(kind), noise.normal(size=7).astype(kind)
    ours, theirs = np.empty_like(base), np.empty_like(base)
    compiled.add(draw, base, ours, by, scale)
    reference.add(draw, base, theirs, by, scale)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("distribution", ["rademacher", "popcount"])
def test_numba_sums_integers_to_the_bits_of_numpy(distribution: Distribution, kind):
    draw, noise = draw_of(distribution), np.random.default_rng(0)
    base = noise.normal(size=11500).astype(np.float32)
    quanta = noise.integers(-(2**24), 2**24, 7).astype(kind)
    ours, theirs = np.empty_like(base), np.empty_like(base)
    compiled.add_exact(draw, base, ours, quanta, 2.0**-24, 0.3)
    reference.add_exact(draw, base, theirs, quanta, 2.0**-24, 0.3)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_projections_of_numba_and_numpy_agree(distribution: Distribution):
    draw, values = draw_of(distribution), np.random.default_rng(0).normal(size=11500)
    np.testing.assert_allclose(
        compiled.project(draw, values), reference.project(draw, values), rtol=1e-12, atol=1e-10
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_an_element_does_not_depend_on_the_range_it_is_drawn_in(distribution: Distribution):
    key, tag = keys_of(1, [3])[0], tag_of(distribution)
    whole = reference.draw_range(distribution, tag, key, 5, 0, 3 * BLOCK)
    for start, size in ((0, 1), (4095, 2), (4096, 4096), (5000, 77), (8191, 4097)):
        part = reference.draw_range(distribution, tag, key, 5, start, size)
        np.testing.assert_array_equal(part, whole[start : start + size])
        out = np.empty((1, size), np.float32)
        compiled.fill(Draw(distribution, tag, key[None], cut(5, start, start + size, 0)), out)
        np.testing.assert_array_equal(out[0], part)


def test_pieces_end_at_blocks_and_skip_empty_tensors():
    pieces = cut([0, 1, 2], [0, 0, 4000], [5000, 0, 4100], [0, 5000, 5000])
    expected = [[0, 0, 0, 4096], [0, 4096, 4096, 904], [2, 4000, 5000, 96], [2, 4096, 5096, 4]]
    assert pieces.tolist() == expected


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "_ENOUGH", 1)
    draw, base = draw_of("gaussian"), np.zeros(11500, np.float32)
    by, results, projections = np.linspace(-1, 1, 7).astype(np.float32), [], []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = np.empty_like(base)
            compiled.add(draw, base, out, by, 1.0)
            results.append(out)
            projections.append(compiled.project(draw, out))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(projections[0], projections[1])


INTERPRETED = """
import numpy as np, torch
from fedloom.spaces.directions import cuda, reference
from fedloom.spaces.directions.stream import Draw, cut, keys_of, tag_of

noise = np.random.default_rng(0)
pieces = np.concatenate((cut(0, 0, 4200, 0), cut(2**31, 2**40 - 300, 2**40 + 200, 4200)))
base, by = noise.normal(size=4700).astype(np.float32), noise.normal(size=3).astype(np.float32)
quanta = noise.integers(-(2**24), 2**24, 3)
def ulps(distribution, ours, theirs):
    apart = np.abs(ours.numpy().view(np.int32).astype(np.int64) - theirs.view(np.int32)).max()
    assert apart <= (4 if distribution == "gaussian" else 0), (distribution, apart)
for distribution in ("gaussian", "rademacher", "popcount"):
    draw = Draw(distribution, tag_of(distribution), keys_of(77, range(3)), pieces)
    ours, theirs = torch.empty(3, 4700), np.empty((3, 4700), np.float32)
    cuda.fill(draw, ours)
    reference.fill(draw, theirs)
    ulps(distribution, ours, theirs)
    for scale in (1.0, 0.3):
        ours, theirs = torch.empty(4700), np.empty(4700, np.float32)
        cuda.add(draw, torch.from_numpy(base), ours, by, scale)
        reference.add(draw, base, theirs, by, scale)
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6, atol=1e-6 if distribution == "gaussian" else 0)
    half = torch.from_numpy(base).bfloat16()
    cuda.add(draw, half, half, by, 1.0)
    assert (half.float() - ours).abs().max() < 8
    projected = cuda.project(draw, torch.from_numpy(base))
    np.testing.assert_allclose(projected, reference.project(draw, base), rtol=1e-4, atol=1e-4)
    for kind in (np.int32, np.int64) if distribution != "gaussian" else ():
        cuda.add_exact(draw, torch.from_numpy(base), ours, quanta.astype(kind), 2.0**-24, 0.3)
        reference.add_exact(draw, base, theirs, quanta.astype(kind), 2.0**-24, 0.3)
        np.testing.assert_array_equal(ours.numpy(), theirs)
print("same")
"""

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: pip install 'fedloom[cuda]'"
)


@needs_triton
@pytest.mark.slow
def test_triton_draws_the_same_stream():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "same\n", done.stderr


COMPILED = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fedloom.spaces.directions import cuda

kinds = {"scalars": "*fp64", "pieces": "*i64", "keys": "*i64", "tag": "i32", "num": "i32"}
kinds |= dict.fromkeys(("CODE", "EXACT", "WIDE"), "constexpr")
for code, exact, by, kind in ((0, False, "*fp32", "*bf16"), (1, True, "*i32", "*fp32"), (2, True, "*i64", "*fp16")):
    signature = {**kinds, "base": kind, "out": kind, "by": by}
    constants = {"CODE": code, "EXACT": exact, "WIDE": exact}
    source = ASTSource(fn=cuda._add, signature=signature, constexprs=constants)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    assert "fma.rn" not in made.asm["ptx"] and made.asm["cubin"]
print("compiled")
"""


@needs_triton
@pytest.mark.slow
def test_triton_compiles_for_a_gpu_without_fused_products(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "compiled\n", done.stderr
