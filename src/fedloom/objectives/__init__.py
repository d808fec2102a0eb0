"""What clients learn and are judged by, and their table."""

from collections.abc import Mapping

from fedloom.objectives.classification import Classification
from fedloom.objectives.dpo import DPO
from fedloom.objectives.kto import KTO
from fedloom.objectives.orpo import ORPO
from fedloom.objectives.selector import Selector
from fedloom.objectives.sft import SFT

OBJECTIVES: Mapping[str, type] = {
    "sft": SFT,
    "classification": Classification,
    "dpo": DPO,
    "orpo": ORPO,
    "kto": KTO,
    "selector": Selector,
}
