"""What clients learn and are judged by, and their table."""

from collections.abc import Mapping

from fedloom.objectives.classification import Classification
from fedloom.objectives.sft import SFT

OBJECTIVES: Mapping[str, type] = {"sft": SFT, "classification": Classification}
