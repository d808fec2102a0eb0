"""How far the evidence that routes somebody new can be believed, from the held-out rows of clients whose cluster is known."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fedloom.core.files import write_atomic
from fedloom.rounds.reading import read_json

FILE = "routing.json"
"""In the run's folder."""
_TRIED = torch.logspace(-2, 4, 61, base=2, dtype=torch.float64)
"""Temperatures among which the likeliest is taken."""


@dataclass(frozen=True)
class Calibration:
    """What the evidence is divided by before it counts; as it stands, it takes models and examples at their word."""

    temperature: float = 1.0
    """Of one example."""
    dependence: float = 0.0
    """[0, 1], which part of an example's evidence those of the same client repeat."""

    def of(self, num_examples: int) -> float:
        """Return the temperature of the summed evidence of so many examples."""
        return self.temperature * (1 + (num_examples - 1) * self.dependence)

    @classmethod
    def fit(cls, evidence: Tensor, prior: Tensor, truth: Sequence[int]) -> Self:
        """Return the likeliest, of examples one by one and of all of a client's together.

        Temperatures are taken for 1 give or take a factor of e until the examples say otherwise.

        Args:
            evidence: (clients, examples of each, clusters) float64, nats.
            prior: (clusters,) chances of each.
            truth: The cluster of each client.
        """
        num_clients, size, num_clusters = evidence.shape
        known = torch.tensor(truth)
        alone = evidence.reshape(-1, num_clusters)
        one = _likeliest(alone, prior, known.repeat_interleave(size), _TRIED)
        if size == 1 or num_clients == 1:
            return cls(one)
        # From nothing new in a second example to nothing in common.
        factors = torch.linspace(1, size, 61, dtype=torch.float64)
        many = _likeliest(evidence.sum(1), prior, known, one * factors)
        return cls(one, (many / one - 1) / (size - 1))


def _likeliest(evidence: Tensor, prior: Tensor, truth: Tensor, tried: Tensor) -> float:
    """Return which of the temperatures makes the clusters `truth` (rows,) of `evidence` (rows, clusters) likeliest."""
    logits = prior.log() + evidence / tried[:, None, None]
    found = logits.log_softmax(2)[:, torch.arange(len(truth)), truth].sum(1)
    return float(tried[(found - tried.log().square() / 2).argmax()])


@dataclass(frozen=True)
class Calibrations:
    """Of the two kinds of evidence."""

    answers: Calibration = Calibration()
    prompts: Calibration = Calibration()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return those of a run; without its file, evidence at its word."""
        file = folder / FILE
        if not file.exists():
            return cls()
        found = read_json(file, dict, remedy="remove it to take evidence at its word")
        try:
            kinds = {kind: found[kind] for kind in ("answers", "prompts")}
            numbers = {
                kind: Calibration(float(one["temperature"]), float(one["dependence"]))
                for kind, one in kinds.items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} must hold temperature and dependence of answers and of prompts: remove it to take evidence at"
                " its word"
            ) from error
        for one in numbers.values():
            if not (0 < one.temperature < math.inf and 0 <= one.dependence <= 1):
                raise ValueError(
                    f"{file} must hold temperatures above 0 and dependences in [0, 1]: remove it to take evidence at its"
                    " word"
                )
        return cls(**numbers)

    def write(self, folder: Path) -> None:
        """Write them into a run's folder."""
        kinds = {
            kind: {"temperature": one.temperature, "dependence": one.dependence}
            for kind, one in (("answers", self.answers), ("prompts", self.prompts))
        }
        write_atomic(folder / FILE, (json.dumps(kinds, indent=2) + "\n").encode())
