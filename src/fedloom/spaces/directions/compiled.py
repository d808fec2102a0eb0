"""numba's kernels: its loops, shared out over threads by pieces, whose results do not depend on one another.

Threads are Python's, as the loops hold no lock: numba's own start with the first call and do not survive a fork.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.spaces.directions import loops
from fedloom.spaces.directions.stream import CODES, Draw

_ENOUGH = 1 << 20
"""Draws a thread is worth starting for: about a quarter of a millisecond of the cheapest distribution's."""


def _share(work: Callable[[NDArray[np.int64]], None], draw: Draw) -> None:
    """Do the work on all pieces, on as many threads as torch uses, where there is enough of it."""
    elements = int(draw.pieces[:, 3].sum())
    threads = min(torch.get_num_threads(), len(draw.pieces), elements * len(draw.keys) // _ENOUGH)
    if threads <= 1:
        work(draw.pieces)
        return
    parts = np.array_split(draw.pieces, threads)
    others = [threading.Thread(target=work, args=(part,)) for part in parts[1:]]
    for other in others:
        other.start()
    work(parts[0])
    for other in others:
        other.join()


def add(draw: Draw, base: Any, out: Any, by: Any, scale: float, moves: int = 0) -> None:
    """Write scale * base + sum_k by_k z_k where the pieces lie; sums in the type of `by`, in order.

    The first `moves` directions are added to base itself before, in the same pass over memory.
    """
    given = float(scale), moves, CODES[draw.distribution], draw.tag, draw.keys, by
    _share(lambda part: loops.add(base, out, *given, part), draw)


def add_exact(draw: Draw, base: Any, out: Any, quanta: Any, unit: float, scale: float) -> None:
    """Write scale * base + unit * sum_k q_k z_k, the sum in integers; `unit` is for z = n / 2 half of theirs."""
    code, times = CODES[draw.distribution], float(scale)
    given = draw.tag, draw.keys, quanta
    _share(lambda part: loops.add_exact(base, out, times, unit, code, *given, part), draw)


def fill(draw: Draw, out: Any) -> None:
    """Write z of every direction, (K, n) float32, where the pieces lie."""
    _share(lambda part: loops.fill(out, CODES[draw.distribution], draw.tag, draw.keys, part), draw)


def project(draw: Draw, values: Any) -> NDArray[np.float64]:
    """Return (K,) z_k . values, over the pieces; summed by 64 fixed parts, whatever the threads."""
    parts = np.array_split(draw.pieces, 64)
    sums = np.zeros((64, len(draw.keys)))
    code, keys = CODES[draw.distribution], draw.keys

    def work(some: NDArray[np.int64]) -> None:
        for at in some[:, 0]:
            loops.project(values, sums[at], code, draw.tag, keys, parts[at])

    ranges = np.zeros((64, 4), np.int64)
    ranges[:, 0], ranges[:, 3] = np.arange(64), [int(part[:, 3].sum()) for part in parts]
    _share(work, Draw(draw.distribution, draw.tag, keys, ranges))
    whole: NDArray[np.float64] = sums.sum(0)
    return whole
