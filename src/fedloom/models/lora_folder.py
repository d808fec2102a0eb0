"""What a PEFT folder of LoRA adds to a model, with one rank and one scale for all layers, as programs that serve read it.

vLLM drops `rank_pattern` and `alpha_pattern` from a folder's configuration without a word, and llama.cpp divides alpha by the
rank whatever `use_rslora` says. Here ranks below the largest are filled up with zeros, and what differs between scales is
in B: where all are alike, no factor changes.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedloom.models.adapters import write_folder
from fedloom.models.hf_logging import quiet

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be; 16 if not given."""
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraFactors:
    """A LoRA whose layers have one rank and one scale."""

    rank: int
    scale: float
    """Of every product: alpha / rank."""
    layers: Mapping[str, tuple[Tensor, Tensor]]
    """By the model's name of a layer: A (rank, in) and B (out, rank)."""
    config: Any
    """PEFT's, as the folder had it."""

    @property
    def alpha(self) -> float:
        """Return what divided by the rank is the scale, a whole number where it is one."""
        alpha = self.scale * self.rank
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha

    def write(self, folder: Path) -> None:
        """Write a PEFT folder without patterns and without rsLoRA."""
        config = copy.copy(self.config)
        config.r, config.lora_alpha, config.use_rslora = self.rank, self.alpha, False
        config.rank_pattern, config.alpha_pattern = {}, {}
        named = {
            f"{_PREFIX}{layer}.lora_{x}.weight": factor.contiguous()
            for layer, factors in self.layers.items()
            for x, factor in zip("AB", factors, strict=True)
        }
        write_folder(folder, named, config)


def read_lora(folder: Path, *, server: str) -> LoraFactors:
    """Return what a PEFT folder adds to its model.

    Args:
        folder: As PEFT writes it.
        server: The program that is to read it, for messages.

    Raises:
        ValueError: where it is anything but pairs of low-rank factors.
    """
    from peft import PeftConfig
    from safetensors.torch import load_file

    with quiet():
        config: Any = PeftConfig.from_pretrained(str(folder))
    _check_config(config, server)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / _WEIGHTS).items():
        layer, _, factor = name.removeprefix(_PREFIX).rpartition(".lora_")
        if factor not in ("A.weight", "B.weight"):
            raise ValueError(
                f"{server} takes pairs of low-rank factors alone, got {name}: {_OTHERWISE}"
            )
        pairs.setdefault(layer, {})[factor[0]] = tensor
    rank = max(len(pair["A"]) for pair in pairs.values())
    scales = {layer: _scale(config, layer) for layer in pairs}
    scale = max(scales.values())
    layers = {
        layer: _filled(pair["A"], pair["B"], rank, gain=scales[layer] / scale)
        for layer, pair in sorted(pairs.items())
    }
    return LoraFactors(rank, scale, layers, config)


def vllm_rank(rank: int) -> int:
    """Return the least `--max-lora-rank` with which vLLM serves an adapter of this rank.

    Raises:
        ValueError: where there is none.
    """
    if rank > VLLM_RANKS[-1]:
        raise ValueError(
            f"vLLM serves adapters of rank {VLLM_RANKS[-1]} at most, got {rank}: {_OTHERWISE}"
        )
    return next(most for most in VLLM_RANKS if most >= rank)


_OTHERWISE = "export the whole model, with --for merged or --for gguf"


def _check_config(config: Any, server: str) -> None:
    """Refuse what servers refuse, or read as something else."""
    kind = str(config.peft_type.value)
    if config.is_prompt_learning:
        raise ValueError(
            f"{server} takes adapters of LoRA alone, got {kind.lower()}, which is no part of a model's weights either:"
            " export it with --for peft"
        )
    if kind != "LORA":
        raise ValueError(f"{server} takes adapters of LoRA alone, got {kind.lower()}: {_OTHERWISE}")
    if config.use_dora:
        raise ValueError(f"{server} has no DoRA (tune.lora.dora): {_OTHERWISE}")
    if config.modules_to_save:
        raise ValueError(
            f"{server} takes no modules that were tuned whole (tune.lora.modules_to_save:"
            f" {', '.join(config.modules_to_save)}): {_OTHERWISE}"
        )
    if config.bias != "none":
        raise ValueError(
            f"{server} takes no biases of an adapter, got bias {config.bias}: {_OTHERWISE}"
        )


def _scale(config: Any, layer: str) -> float:
    """Return what the product of a layer's factors is multiplied by."""
    from peft.utils.other import get_pattern_key

    def of(pattern: Mapping[str, float], otherwise: float) -> float:
        return pattern.get(get_pattern_key(list(pattern), layer), otherwise)

    rank, alpha = of(config.rank_pattern, config.r), of(config.alpha_pattern, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _filled(a: Tensor, b: Tensor, rank: int, *, gain: float) -> tuple[Tensor, Tensor]:
    """Return factors of a larger rank with `gain` times the product."""
    more = rank - len(a)
    if gain != 1.0:
        b = (b.to(torch.float64) * gain).to(b.dtype)
    return pad(a, (0, 0, 0, more)), pad(b, (0, more))
