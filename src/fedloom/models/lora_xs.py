"""LoRA-XS: a small square matrix that learns between frozen factors, which are directions of each layer's own weight."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fedloom.models.adapters import (
    Adapter,
    attached,
    check_width,
    fan_in_fan_out,
    write_folder,
)
from fedloom.models.build import clean
from fedloom.models.introspection import is_adapted, is_transposed
from fedloom.models.pissa import principal_directions
from fedloom.models.quantized import QuantizedLinear
from fedloom.models.targets import choose_targets, left_frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Factor(nn.Module):
    """A linear layer whose weight is no parameter and in no state: it follows from the base model."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Core(nn.Module):
    """B R in the place of PEFT's B, of which R alone learns; it begins at zero."""

    b: Tensor

    def __init__(self, b: Tensor) -> None:
        super().__init__()
        rank = b.shape[1]
        self.register_buffer("b", b, persistent=False)
        self.core = nn.Parameter(b.new_zeros(rank, rank))

    @property
    def weight(self) -> Tensor:
        """Return the product, (out, rank), which PEFT merges."""
        return self.b @ self.core

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.core), self.b)


class CoreAdapter(Adapter):
    """A PEFT adapter whose B holds a core; folders have plain LoRA of the same rank, R folded into B."""

    def save(self, folder: Path, values: Mapping[str, Tensor]) -> None:
        named: dict[str, Tensor] = {}
        for full_name, module in _adapted(self._peft):
            name, inner = clean(full_name), module.lora_B["default"]
            folded = inner.b.cpu() @ values[f"{name}.lora_B.core"].cpu()
            for x, factor in {"A": module.lora_A["default"].weight.cpu(), "B": folded}.items():
                named[f"base_model.model.{name}.lora_{x}.weight"] = factor.contiguous()
        write_folder(folder, named, self.config)

    def save_as_lora(self, folder: Path, values: Mapping[str, Tensor]) -> None:
        self.save(folder, values)


def attach_lora_xs(
    model: "PreTrainedModel",
    *,
    rank: int,
    alpha: float,
    targets: str | Sequence[str],
    seed: int,
    base_name: str,
) -> CoreAdapter:
    """Attach cores between the largest singular directions of every adapted weight, in place; the model stays the same.

    Raises:
        ValueError: where a target does not exist, or is smaller than the rank.
    """
    from peft import LoraConfig

    path = "tune.lora_xs.targets"
    chosen = choose_targets(model, targets, path=path)
    check_width(model, chosen.layers, rank, setting="tune.lora_xs.rank")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=chosen.peft_targets,
        exclude_modules=chosen.peft_left_out or None,
        fan_in_fan_out=fan_in_fan_out(model, chosen),
        task_type="CAUSAL_LM",
    )
    peft = attached(model, config, chosen, seed=seed, base_name=base_name)
    for _, module in _adapted(model):
        base, a = module.get_base_layer(), module.lora_A["default"].weight
        weight = base.whole() if isinstance(base, QuantizedLinear) else base.weight
        right, left = principal_directions(weight.t() if is_transposed(base) else weight, rank)
        module.lora_A["default"] = Factor(right.to(a))
        module.lora_B["default"] = Core(left.to(a))
    model.eval()
    return CoreAdapter(peft, left_frozen=left_frozen(model, targets, chosen, path=path))


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if is_adapted(module)]
