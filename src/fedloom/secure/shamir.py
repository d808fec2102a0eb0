"""Shamir's shares of 32 bytes: any `threshold` of them give the secret back, fewer tell nothing of it.

How to Share a Secret. Shamir, Communications of the ACM 22(11), 1979: the secret is the value at 0 of a random
polynomial of degree threshold - 1 over a prime field, a share its value at 1, 2, and so on.
"""

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**256 + 297
"""The least prime above 2^256, so that every 32 bytes are an element."""
SECRET_BYTES = 32
SHARE_BYTES = 33
"""An element, big-endian; who holds it knows at which place."""


def split(secret: bytes, *, threshold: int, holders: int) -> list[bytes]:
    """Return the shares of the holders, of those at places 1 to `holders`.

    Raises:
        ValueError: where the secret is not of 32 bytes, or no so many holders could give it back.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret to share must have {SECRET_BYTES} bytes, got {len(secret)}")
    if not 1 <= threshold <= holders:
        raise ValueError(f"threshold must be from 1 to {holders} holders, got {threshold}")
    drawn = (secrets.randbelow(PRIME) for _ in range(threshold - 1))
    return shares_of([int.from_bytes(secret, "big"), *drawn], holders)


def shares_of(polynomial: Sequence[int], holders: int) -> list[bytes]:
    """Return the values at 1 to `holders` of a polynomial, lowest coefficient first."""
    values = []
    for place in range(1, holders + 1):
        value = 0
        for coefficient in reversed(polynomial):
            value = (value * place + coefficient) % PRIME
        values.append(value.to_bytes(SHARE_BYTES, "big"))
    return values


def element(share: bytes) -> int:
    """Return the value of a share.

    Raises:
        ValueError: where it is none.
    """
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise ValueError(f"a share must be an element of the field in {SHARE_BYTES} bytes")
    return value


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of as many shares as its threshold, by place.

    Raises:
        ValueError: where they are shares of nothing of 32 bytes.
    """
    points = {place: element(share) for place, share in shares.items()}
    secret = 0
    for place, value in points.items():
        top, bottom = 1, 1
        for other in points:
            if other != place:
                top, bottom = top * other % PRIME, bottom * (other - place) % PRIME
        secret = (secret + value * top * pow(bottom, -1, PRIME)) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("the shares do not belong together")
    return secret.to_bytes(SECRET_BYTES, "big")
