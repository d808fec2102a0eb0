"""Objectives of preferences under the algorithms: the same laws, with pairs of answers and a reference model."""

from pathlib import Path
from typing import Any

import pytest

from fedloom.core.protocols import Algorithm
from fedloom.objectives.dpo import DPO
from fedloom.objectives.kto import KTO
from fedloom.objectives.objective import Objective
from fedloom.objectives.orpo import ORPO
from fedloom.objectives.selector import Selector
from fedloom.testing.examination import examine
from fedloom.testing.subject import Subject

pytestmark = pytest.mark.slow

COMPOSED = (
    "fedavg",
    "fedprox",
    "ditto(fedavg)",
    "flasc(fedadam)",
    "clustered(fedavg)",
    "private(fedavg)",
    "fedkseed",
)
OBJECTIVES: dict[str, Objective] = {
    "dpo": DPO(),
    "dpo of the download": DPO(reference="download"),
    "kto": KTO(),
    "orpo": ORPO(),
    "selector": Selector(),
}


@pytest.mark.parametrize("law", ["resume", "engines", "batched"])
@pytest.mark.parametrize("name", COMPOSED)
def test_dpo_keeps_the_laws_under(
    name: str, law: str, cases: dict[str, Algorithm[Any]], tmp_path: Path
) -> None:
    space: Any = "seeds" if name == "fedkseed" else "lora"
    skipped = examine(Subject(cases[name], tmp_path, space, objective=DPO()), law)
    assert bool(skipped) == (law == "batched" and space == "seeds")


@pytest.mark.parametrize("law", ["resume", "batched"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_fedavg_keeps_the_laws_with(
    name: str, law: str, cases: dict[str, Algorithm[Any]], tmp_path: Path
) -> None:
    assert examine(Subject(cases["fedavg"], tmp_path, objective=OBJECTIVES[name]), law) is None


@pytest.mark.parametrize("law", ["resume", "engines", "batched", "absences"])
def test_balanced_clusters_of_selectors_keep_the_laws(
    law: str, cases: dict[str, Algorithm[Any]], tmp_path: Path
) -> None:
    """FedBiscuit."""
    subject = Subject(cases["clustered balanced(fedavg)"], tmp_path, objective=Selector())
    assert examine(subject, law) is None
