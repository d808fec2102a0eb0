"""Noise that clients add themselves, each a share, so that a secure sum has enough of it before anybody opens it.

Our Data, Ourselves: Privacy via Distributed Noise Generation. Dwork, Kenthapadi, McSherry, Mironov, Naor, EUROCRYPT 2006.
Over the whole steps of a secure sum as in The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation. Kairouz, Liu, Steinke, ICML 2021 (arXiv:2102.06387).

No sum that can be told is of fewer clients than `secure.threshold` (t), so a share has the standard deviation z C / sqrt(t): a
sum of n has z C sqrt(n / t), at least what is accounted for. Who drops out takes its share along, and what is left is enough.

Deviation: a share is a normal rounded to whole steps, where the paper draws discrete Gaussians. Its characteristic function
is the normal's times that of a uniform within a step, up to terms of the order exp(-(pi s)^2 / 2), s its standard deviation in steps, below
1e-130 as `LEAST_STEPS` is 8. So a sum of rounded shares is, up to that, the rounded sum of one normal and of uniforms that
know nothing of clients: a Gaussian mechanism, and what is made of its result.
"""

import math

from torch import Tensor

from fedloom.privacy.noise import normals, secret_key

LEAST_STEPS = 8.0
"""Standard deviation of a share, in steps of the sum, below which rounding might show."""
_ROOM = 10.0
"""Standard deviations of a sum's noise that have room beside what clients send."""


def share_of(std: float, threshold: int) -> float:
    """Return the standard deviation of a share, where as many as `threshold` together have `std`."""
    return std / math.sqrt(threshold)


def share_in_steps(count: int, *, std: float) -> Tensor:
    """Return (count,) int64, a fresh share that nobody can repeat.

    Args:
        count: How many coordinates.
        std: Its standard deviation in steps.
    """
    return normals(secret_key(None), "share", shape=(count,)).mul_(std).round_().long()


def check_room(
    noise_multiplier: float, *, norm: float, threshold: int, bits: int, entry: float
) -> None:
    """Refuse a secure sum in which shares would overflow, or be so small that rounding shows.

    Args:
        noise_multiplier: z.
        norm: C, the longest upload.
        threshold: Fewest clients of a sum.
        bits: A step is entry * 2^-bits.
        entry: The largest entry of an upload.

    Raises:
        ValueError: with what to set instead.
    """
    # n (entry - C) must hold so many times z C sqrt(n / t), of which n = t asks for most.
    least = norm * (1 + _ROOM * noise_multiplier / threshold)
    if entry < least:
        raise ValueError(
            f"secure.clip must be at least {least:.4g} for private.noise distributed, so that sums have room for the noise"
            f" beside uploads of norm {norm:g} (private.clip), got {entry:g}"
        )
    steps = share_of(noise_multiplier * norm, threshold) * 2.0**bits / entry
    if steps < LEAST_STEPS:
        raise ValueError(
            f"secure.bits must be at least {bits + math.ceil(math.log2(LEAST_STEPS / steps))} for private.noise"
            f" distributed, whose shares would have a standard deviation of {steps:.2g} steps, got {bits}"
        )
