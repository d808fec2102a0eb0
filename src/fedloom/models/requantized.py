"""A merged model in NF4 once more, as a folder that transformers loads; and how far that is from what was merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedloom.models.generation import keep_file
from fedloom.models.hf_logging import quiet
from fedloom.models.probe import plain_ids
from fedloom.models.quantized import QuantizedLinear
from fedloom.models.schemes import NF4

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROBED = 64
"""Tokens whose logits are compared."""


@dataclass(frozen=True, slots=True)
class Drift:
    """What rounding has moved, each as a share of the merged model's own."""

    learnt: float
    """Of the weights, what training had moved them by."""
    weights: float
    """Of the weights, what rounding them again moves them by."""
    logits: float
    """Of the logits of a few tokens."""

    def __str__(self) -> str:
        return (
            f"rounding again moves the weights by {100 * self.weights:.2g} %, where training has moved them by"
            f" {100 * self.learnt:.2g} %, and logits by {100 * self.logits:.2g} %"
        )


def check_nf4(layers: Mapping[str, QuantizedLinear]) -> NF4:
    """Return the scheme of layers in NF4.

    Raises:
        ValueError: where they are in another, which no other program reads, or there are none.
    """
    schemes = {layer.scheme for layer in layers.values()}
    found = schemes.pop() if len(schemes) == 1 else None
    if not isinstance(found, NF4):
        got = "none" if found is None else found.name
        raise ValueError(
            f"model.quantize must be nf4 for a model that is quantised again, got {got}: export it merged, or the adapter"
            " alone"
        )
    return found


@torch.no_grad()
def write_nf4(
    merged: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    layers: Mapping[str, QuantizedLinear],
    folder: Path,
) -> Drift:
    """Write a plain model with some of its layers in NF4, and return what that has moved.

    Args:
        merged: The model; its layers become quantised ones.
        tokenizer: Beside it.
        layers: As they were before anything was merged into them, by name.
        folder: Where.
    """
    scheme, ids = check_nf4(layers), plain_ids(merged, _PROBED)[None]
    before: Tensor = merged(input_ids=ids, use_cache=False).logits.float()
    moved = learnt = whole = 0.0
    state, dtype = dict[str, Tensor](), merged.dtype
    for name, old in layers.items():
        plain = merged.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        small, weight = QuantizedLinear(plain, scheme), plain.weight.float()
        moved += float((small.whole() - weight).square().sum())
        learnt += float((weight - old.whole()).square().sum())
        whole += float(weight.square().sum())
        parent, _, child = name.rpartition(".")
        setattr(merged.get_submodule(parent), child, small)
        levels = small.packed["weight"].reshape(-1, 1)
        held = scheme.serialised(small.packed, (small.out_features, small.in_features), dtype)
        state |= {f"{name}.weight": levels}
        state |= {f"{name}.weight.{key}": values for key, values in held.items()}
    logits: Tensor = merged(input_ids=ids, use_cache=False).logits.float()
    inside = {f"{name}.{part}" for name, layer in layers.items() for part in layer.packed}
    state |= {n: t for n, t in merged.state_dict().items() if n not in inside}
    _write(merged, tokenizer, state, folder)
    far, rounded = ((part / whole) ** 0.5 for part in (learnt, moved))
    return Drift(far, rounded, float((logits - before).norm() / before.norm()))


def _write(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    state: Mapping[str, Tensor],
    folder: Path,
) -> None:
    from transformers import BitsAndBytesConfig

    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    with quiet():
        config: Any = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=model.dtype,
            llm_int8_skip_modules=plain,
        )
        model.config.quantization_config = config
        model.save_pretrained(folder, state_dict={n: t.cpu() for n, t in state.items()})
        keep_file(model, folder)
        tokenizer.save_pretrained(folder)
