"""Noise is normal, secret, and the same for whoever has the key."""

import math

import numpy as np
import pytest
import torch

from fedloom.privacy.noise import normals, secret_key, uniforms

KEY = secret_key(3)


def test_a_million_draws_are_normal() -> None:
    drawn = normals(KEY, "a", shape=(1_000_003,))
    assert drawn.dtype is torch.float64
    assert abs(float(drawn.mean())) < 5 / 1000
    assert float(drawn.std()) == pytest.approx(1, rel=0.005)
    assert float((drawn**4).mean()) == pytest.approx(3, rel=0.02)
    for quantile, value in ((0.5, 0.0), (0.8413447, 1.0), (0.0227501, -2.0), (0.9986501, 3.0)):
        assert float((drawn < value).double().mean()) == pytest.approx(quantile, abs=2e-3)
    correlation = float((drawn[:-1] * drawn[1:]).mean())
    halves = float((drawn[: len(drawn) // 2] * drawn[len(drawn) // 2 : -1]).mean())
    assert max(abs(correlation), abs(halves)) < 5 / 1000


def test_keys_and_paths_are_apart_and_repeat() -> None:
    def first(key: bytes, *path: str | int) -> float:
        return float(normals(key, *path, shape=(2, 3))[1, 2])

    again = [first(KEY, "a", 1), first(KEY, "a", 1)]
    assert again[0] == again[1]
    others = [first(secret_key(4), "a", 1), first(KEY, "a", 2), first(KEY, "a", "1")]
    assert len({*again, *others}) == 4


def test_without_a_seed_no_two_keys_are_alike() -> None:
    keys = {secret_key(None) for _ in range(9)} | {secret_key(0), secret_key(1)}
    assert len(keys) == 11
    assert {len(key) for key in keys} == {32}
    assert secret_key(1) == secret_key(1)


def test_shapes_of_none_one_and_an_odd_number() -> None:
    for shape in ((), (0,), (1,), (3,), (2, 0), (5, 1)):
        drawn = normals(KEY, "shapes", shape=shape)
        assert drawn.shape == torch.Size(shape)
        assert bool(torch.isfinite(drawn).all())
        assert len(set(drawn.flatten().tolist())) == math.prod(shape)


def test_uniforms_fill_the_unit_interval() -> None:
    drawn = np.array(uniforms(KEY, "u", count=100_000))
    assert 0 <= drawn.min() < 1e-4 < 1 - 1e-4 < drawn.max() < 1
    assert drawn.mean() == pytest.approx(0.5, abs=5e-3)


def test_the_stream_is_pinned() -> None:
    """A change here would give a resumed run other cohorts and other noise."""
    key = secret_key(0)
    assert uniforms(key, "cohort", 1, count=2) == [0.542450634896392, 0.8254904524302423]
    u, v = uniforms(key, "noise", 0, count=2)
    expected = math.sqrt(-2 * math.log1p(-u)) * math.cos(2 * math.pi * v)
    assert float(normals(key, "noise", shape=(1,))) == pytest.approx(expected, rel=1e-12)
