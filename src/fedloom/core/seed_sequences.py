"""Sequences of seeds, a direction of a seed space a step: who may draw them, and where they lead.

The coordinates of a seed space are one vector, `COEFFICIENTS`: (K,) coefficients of K directions that everybody can make.
"""

import hashlib

import torch
from torch import Tensor

from fedloom.core.protocols import Params

COEFFICIENTS = "coefficients"
"""Of the vector, in the params of a seed space as in walks and scalars."""


def uniform_seeds(seed: int, steps: int, num_seeds: int) -> Tensor:
    """Return (steps,) int64 directions, each of `num_seeds` alike.

    Both sides of a message draw it, so it comes from SHAKE-256 and not from a generator that another version of torch
    might change. A remainder of 63 bits, it favours none by more
    than num_seeds in 2^63.
    """
    digest = bytearray(hashlib.shake_256(repr((seed, "walk")).encode()).digest(8 * steps))
    return (torch.frombuffer(digest, dtype=torch.int64) & (1 << 63) - 1) % num_seeds


def landed(sequence: Tensor, scalars: Tensor, num_seeds: int) -> Tensor:
    """Return (num_seeds,) float64: the sum of the scalars met along each direction."""
    sums = torch.zeros(num_seeds, dtype=torch.float64)
    return sums.index_add_(0, sequence, scalars.double())


def pace(moved: Params, sequence: Tensor, scalars: Tensor) -> float:
    """Return the learning rate that turned a seed sequence's scalars into the move; 0 where nothing moved."""
    sums = landed(sequence, scalars, moved[COEFFICIENTS].numel())
    length = float(sums @ sums)
    return -float(moved[COEFFICIENTS].double() @ sums) / length if length else 0.0


def widened(params: Params) -> dict[str, Tensor]:
    """Return params as a trainer takes them: float64, though they travelled as float32."""
    return {name: tensor.double() for name, tensor in params.items()}
