"""The one place where torch's global generator is seeded, for libraries that take no other."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's global generators start at `seed`, and put them back as they were: nobody else's numbers move."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)  # noqa: TID251  # inside the fork; dropout and PEFT take no generator
        yield
