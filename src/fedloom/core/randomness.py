"""The only source of randomness, and the one place where torch's global generator is seeded, for libraries that take no other."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's global generators start at `seed`, and put them back as they were: nobody else's numbers move."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)  # noqa: TID251  # inside the fork; dropout and PEFT take no generator
        yield
