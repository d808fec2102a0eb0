"""Draws from a secret key: the same every time for whoever has it, noise for everybody else.

Torch's generator keeps 32 bits of a seed and its outputs give away its state, so noise from it
could be searched for and taken off again. Here the bytes are SHAKE-256 (FIPS 202) of a key of 256
bits and a path, and normals come from them by Box and Muller's transform, in float64 and by NumPy,
whose results do not depend on the number of threads.
"""

import hashlib
import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PIECE = 1 << 20
"""Normals made at a time: what a large tensor needs besides itself."""


def secret_key(seed: int | None) -> bytes:
    """Return a fresh key nobody can repeat; with a seed the key of that seed, which hides nothing."""
    if seed is None:
        return secrets.token_bytes(32)
    return hashlib.sha256(f"noise seed {seed}".encode()).digest()


def uniforms(key: bytes, *path: str | int, count: int) -> list[float]:
    """Return `count` draws from [0, 1)."""
    numbers: list[float] = _unit(key, path, count).tolist()
    return numbers


def normals(key: bytes, *path: str | int, shape: Sequence[int]) -> Tensor:
    """Return float64 draws from the standard normal distribution."""
    drawn = np.empty(math.prod(shape))
    for at in range(0, drawn.size, _PIECE):
        piece = drawn[at : at + _PIECE]
        half = (piece.size + 1) // 2
        unit = _unit(key, (*path, at), 2 * half)
        radius, angle = np.sqrt(-2 * np.log1p(-unit[:half])), 2 * np.pi * unit[half:]
        piece[:half] = radius * np.cos(angle)
        piece[half:] = (radius * np.sin(angle))[: piece.size - half]
    return torch.from_numpy(drawn).view(tuple(shape))


def _unit(key: bytes, path: Sequence[str | int], count: int) -> np.ndarray[Any, np.dtype[Any]]:
    """Return multiples of 2^-53 in [0, 1)."""
    data = hashlib.shake_256(key + repr(tuple(path)).encode()).digest(8 * count)
    return (np.frombuffer(data, "<u8") >> np.uint64(11)) * 2.0**-53
