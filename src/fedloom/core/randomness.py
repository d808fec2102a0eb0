"""The only source of randomness."""

import hashlib

import torch


def derive(seed: int, *path: str | int) -> int:
    """Return the 63-bit seed of `path` below `seed`.

    One-way (BLAKE2b), so a child's seed tells nothing of its parent's.
    """
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *path: str | int) -> torch.Generator:
    """Return a fresh CPU generator for `path` below `seed`."""
    return torch.Generator().manual_seed(derive(seed, *path))
