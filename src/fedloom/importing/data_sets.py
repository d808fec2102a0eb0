"""Data sets by the names that other frameworks give them."""

from collections.abc import Mapping
from typing import Any

_INPUT_AS_QUESTION = {"prompt": "input", "completion": "output"}

HUB: Mapping[str, Mapping[str, Any]] = {
    "openai/gsm8k": {"source": "openai/gsm8k", "config": "main"},
    "gsm8k": {"source": "openai/gsm8k", "config": "main"},
    "lighteval/MATH": {
        "source": "lighteval/MATH",
        "config": "all",
        "columns": {"prompt": "problem", "completion": "solution"},
    },
    "HuggingFaceH4/ultrafeedback_binarized": {
        "source": "HuggingFaceH4/ultrafeedback_binarized",
        "split": "train_sft",
    },
    "CohereForAI/aya_dataset": {
        "source": "CohereLabs/aya_dataset",
        "columns": {"prompt": "inputs", "completion": "targets"},
    },
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
HUB_ALIASES = {
    "CohereLabs/aya_dataset": "CohereForAI/aya_dataset",
    "aya_dataset": "CohereForAI/aya_dataset",
}


def on_hub(name: str) -> dict[str, Any]:
    """Return the part of section `data` that reads a data set of the Hub."""
    return dict(HUB.get(HUB_ALIASES.get(name, name), {"source": name}))


def under_data(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of the section `data` by their whole path."""
    return {f"data.{name}": value for name, value in section.items()}
