"""Data sets by the names that other frameworks give them."""

from collections.abc import Mapping
from typing import Any

from fedloom.data.catalogue import CATALOGUE

_INPUT_AS_QUESTION = {"prompt": "input", "completion": "output"}

_HUB: Mapping[str, Mapping[str, Any]] = {
    "lighteval/MATH": {
        "source": "lighteval/MATH",
        "config": "all",
        "columns": {"prompt": "problem", "completion": "solution"},
    },
    "HuggingFaceH4/ultrafeedback_binarized": {"source": "ultrafeedback", "split": "train_sft"},
    "medalpaca/medical_meadow_medical_flashcards": {
        "source": "medalpaca/medical_meadow_medical_flashcards",
        "columns": _INPUT_AS_QUESTION,
    },
    "flwrlabs/medical-meadow-medical-flashcards": {
        "source": "flwrlabs/medical-meadow-medical-flashcards",
        "columns": _INPUT_AS_QUESTION,
    },
}
"""Data sets of the Hub that need more than their id."""
_OTHERWISE = {"CohereForAI/aya_dataset": "aya", "aya_dataset": "aya"}


def on_hub(name: str) -> dict[str, Any]:
    """Return the part of section `data` that reads a data set of the Hub: by its name here, if it has one."""
    if name in _HUB:
        return dict(_HUB[name])
    known = {named.hub: ours for ours, named in CATALOGUE.items() if named.hub}
    return {"source": known.get(name, _OTHERWISE.get(name, name))}


def under_data(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of the section `data` by their whole path."""
    return {f"data.{name}": value for name, value in section.items()}
