"""What the processes that train a client together are started with, and the files that jobs and answers travel in."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedloom.core.protocols import Done, Evaluate, Fit, Job, Losses, Proximal, Tail

TYPES = [Job, Fit, Proximal, Evaluate, Losses, Tail, Done]
"""What is in the files that jobs and answers travel in, beside tensors and plain values."""


@dataclass(frozen=True, slots=True)
class RankSettings:
    """What one of the processes is started with."""

    rank: int
    recipe: str
    """The file of the recipe."""
    site: str
    """The file of the site's settings."""
    meeting: str
    """The file in which the processes find each other."""
    threads: int
    """Of this process on the CPU."""

    def write(self, file: Path) -> None:
        """Write it for the process."""
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> "RankSettings":
        """Read what `write` wrote."""
        return cls(**json.loads(file.read_text()))


def write_values(values: list[Any], file: Path) -> None:
    """Write jobs or answers."""
    torch.save(values, file)


def read_values(file: Path) -> list[Any]:
    """Return jobs or answers; of their tensors only what is looked at is read."""
    with torch.serialization.safe_globals(list(TYPES)):
        values: list[Any] = torch.load(file, weights_only=True, mmap=True)
    return values
