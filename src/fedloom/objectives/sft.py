"""Supervised fine-tuning: every token of the answers is learnt."""

from dataclasses import dataclass

from fedloom.data.preparation import Supervised
from fedloom.objectives.objective import TokenObjective


@dataclass(frozen=True, slots=True)
class SFT(Supervised, TokenObjective):
    """Every token of the answers, by its likelihood among the whole vocabulary."""


DEFAULT = SFT()
"""Where no objective is named."""
