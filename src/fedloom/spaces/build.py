"""What is tuned: the recipe's `tune` section, and the space it stands for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from fedloom.core.protocols import Params
from fedloom.models.adapters import LoRA, attach_lora, trainable
from fedloom.models.build import Base
from fedloom.models.quiet import quiet
from fedloom.spaces.live import Live


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """Which coordinates of the model are learnt: the recipe's `tune` section."""

    space: Literal["lora", "full"] = "lora"
    """lora: low-rank adapters on a frozen base; full: every weight."""
    rank: int = 8
    """Of the adapters."""
    alpha: float = 16.0
    """The update is alpha / rank (rslora: alpha / sqrt(rank)) times B A."""
    dropout: float = 0.0
    """Of the adapters' input, [0, 1)."""
    rslora: bool = False
    """Scale by the root of the rank (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Tune magnitude and direction apart (Liu et al. 2024, arXiv:2402.09353)."""
    targets: str | Sequence[str] = "all-linear"
    """Linear layers that get an adapter, by the end of their name."""
    modules_to_save: Sequence[str] = ()
    """Modules that are tuned whole beside the adapters."""
    origin: Literal["initial", "zero"] = "initial"
    """Where coordinates count from: the start everybody shares, or nothing."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.space not in ("lora", "full"):
            raise ValueError(f"tune.space must be lora or full, got {self.space}")
        if self.rank < 1:
            raise ValueError(f"tune.rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"tune.alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"tune.dropout must be in [0, 1), got {self.dropout}")
        if self.origin not in ("initial", "zero"):
            raise ValueError(f"tune.origin must be initial or zero, got {self.origin}")
        if not self.targets:
            raise ValueError("tune.targets must be all-linear or name linear layers, got none")
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"tune.modules_to_save must be a list, got {self.modules_to_save}")
        asked = self.dropout or self.rslora or self.dora or self.modules_to_save
        if self.space == "full" and asked:
            raise ValueError(
                "tune.dropout, rslora, dora and modules_to_save belong to tune.space lora, got full"
            )


class Tuned(Protocol):
    """What make_space adds to a space's coordinates: folders of deployed weights."""

    def save(self, folder: Path, params: Params) -> None:
        """Write params as others read them: a PEFT folder, or of full tuning a whole model."""
        ...

    def save_merged(self, folder: Path, params: Params) -> None:
        """Write a plain model that needs no adapter."""
        ...


class LoRASpace(Live):
    """The trainable tensors of a PEFT adapter."""

    def __init__(self, base: Base, tune: TuneSettings, *, seed: int) -> None:
        lora = LoRA(
            tune.rank,
            tune.alpha,
            tune.dropout,
            tune.rslora,
            tune.dora,
            tune.targets,
            tune.modules_to_save,
        )
        self._adapter = attach_lora(base.model, lora, seed=seed, base_name=base.name)
        self._tokenizer = base.tokenizer
        super().__init__(base.model, trainable(base.model), origin=tune.origin)

    def save(self, folder: Path, params: Params) -> None:
        self._adapter.save(folder, self.absolute(params))

    def save_merged(self, folder: Path, params: Params) -> None:
        self.load(params)
        self._adapter.save_merged(folder, self._tokenizer)


class FullSpace(Live):
    """Every weight of the model; tied weights are one tensor."""

    def __init__(self, base: Base, tune: TuneSettings) -> None:
        low = {p.dtype for p in base.model.parameters()} & {torch.bfloat16, torch.float16}
        if low:
            raise ValueError(
                "tune.space full tunes the weights themselves, which needs model.dtype float32,"
                f" got {str(low.pop()).removeprefix('torch.')}; local.precision bfloat16 makes it fast"
            )
        base.model.requires_grad_(True)
        self._base = base
        super().__init__(base.model, trainable(base.model), origin=tune.origin)

    def save(self, folder: Path, params: Params) -> None:
        self.save_merged(folder, params)

    def save_merged(self, folder: Path, params: Params) -> None:
        self.load(params)
        # Cloned, since the live tensors are views of one vector, which safetensors takes for shared.
        state = {
            name: t.detach().cpu().clone() for name, t in self._base.model.state_dict().items()
        }
        with quiet():
            self._base.model.save_pretrained(folder, state_dict=state)
            self._base.tokenizer.save_pretrained(folder)


def make_space(base: Base, tune: TuneSettings, *, seed: int) -> LoRASpace | FullSpace:
    """Return the space over the base model, which it changes in place: one space a model.

    Raises:
        ValueError: where a target or a module to save does not exist, or the weights cannot be tuned.
    """
    if tune.space == "full":
        return FullSpace(base, tune)
    return LoRASpace(base, tune, seed=seed)
