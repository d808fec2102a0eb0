"""Base models and adapters as other frameworks ask for them: what PEFT takes by itself, and weights in few bits."""

from typing import Any, get_args, get_type_hints

from fedloom.importing.counterparts import Becomes, NoCounterpart
from fedloom.models.build import ModelSettings

_TARGETS = {
    ("gpt2",): ["c_attn"],
    ("bloom", "neox", "pythia", "falcon"): ["query_key_value"],
    ("phi-2", "phi-1"): ["q_proj", "v_proj", "fc1", "fc2"],
    ("phi-3", "phi-4"): ["qkv_proj"],
}
"""Layers that PEFT adapts where nothing is said, by a part of the model's name."""
_LAYERS = {"13b": 40, "7b": 32, "8b": 32, "open_llama_3b": 26, "gpt2": 12}
"""Layers of models that offsite tuning is configured for by the place of the last."""


def default_targets(model: str) -> list[str]:
    """Return the layers PEFT adapts in a model where none are named; of most architectures queries and values."""
    name = model.lower()
    found = (layers for parts, layers in _TARGETS.items() if any(part in name for part in parts))
    return next(found, ["q_proj", "v_proj"])


def num_layers(model: str) -> int | None:
    """Return how many layers a model of such a name has; None where the name does not say."""
    name = model.lower()
    return next((layers for part, layers in _LAYERS.items() if part in name), None)


def quantized(bits: int) -> Becomes:
    """Return the setting for a base model in so many bits."""
    known = get_args(get_type_hints(ModelSettings)["quantize"])
    if bits == 8:
        return Becomes({"model.quantize": "int8"}, "a scale a row, no outliers apart")
    if bits == 4 and "nf4" in known:
        return Becomes({"model.quantize": "nf4"})
    if bits == 4:
        return Becomes({"model.quantize": "int8"}, "eight bits in the place of four")
    raise NoCounterpart(f"{bits} bits a weight: model.quantize takes {', '.join(known)}")


def lora(rank: int, alpha: float, dropout: float, targets: Any) -> dict[str, Any]:
    """Return the section `tune` of low-rank adapters."""
    return {"lora": {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": targets}}
