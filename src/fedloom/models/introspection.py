"""The parts of a Hugging Face model that training looks at: its head, its frozen layers, its adapters; and their names in a sentence."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedloom.models.build import clean
from fedloom.models.probe import plain_ids
from fedloom.models.quantized import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ADAPTER = re.compile(r"\.(?:lora|ia3|vera)_|^prompt_encoder\.")
"""Where an adapter begins in the name of a tensor of its."""
_SPLIT: "WeakKeyDictionary[nn.Module, tuple[nn.Module, bool]]" = WeakKeyDictionary()
"""Models that were asked -> their head then, and whether it makes their logits of hidden states."""


@dataclass(frozen=True, slots=True)
class FrozenLinear:
    """A linear layer that does not learn."""

    module: nn.Module
    weight: Tensor
    """(out, in); a view where the layer keeps it transposed, and integers of any shape where it is `packed`."""
    bias: Tensor | None
    packed: QuantizedLinear | None = None
    """The layer itself, where its weight is held in few bits."""


@dataclass(frozen=True, slots=True)
class FrozenNorm:
    """A layer that divides vectors by their root mean square, and does not learn."""

    module: nn.Module
    weight: Tensor
    """(width,) float32 factors."""
    eps: float


@dataclass(frozen=True, slots=True)
class LoRALayer:
    """A linear layer with a plain low-rank adapter, whose tensors are called `name`.lora_A.weight and lora_B."""

    name: str
    module: nn.Module
    base: FrozenLinear
    scaling: float
    a: Tensor
    """(rank, in), as it stands when read."""
    b: Tensor
    """(out, rank), as it stands when read."""


@dataclass(frozen=True, slots=True)
class IA3Layer:
    """A linear layer whose input or output is scaled, by a tensor called `name`.ia3_l."""

    name: str
    module: nn.Module
    base: FrozenLinear
    scales_input: bool


@dataclass(frozen=True, slots=True)
class VeRALayer:
    """A linear layer with vectors around frozen projections, called `name`.vera_lambda_d and vera_lambda_b."""

    name: str
    module: nn.Module
    base: FrozenLinear
    a: Tensor
    """(rank, in), which does not learn."""
    b: Tensor
    """(out, rank), which does not learn."""


@dataclass(frozen=True, slots=True)
class CoreLayer:
    """A linear layer with a square matrix between frozen factors, called `name`.lora_B.core."""

    name: str
    module: nn.Module
    base: FrozenLinear
    scaling: float
    a: Tensor
    """(rank, in), which does not learn."""
    b: Tensor
    """(out, rank), which does not learn."""


AdaptedLayer = LoRALayer | IA3Layer | VeRALayer | CoreLayer


@dataclass(frozen=True, slots=True)
class Readout:
    """A model in two: hidden states, and the head that makes logits of them."""

    hidden: Callable[..., Tensor]
    """Takes the model's inputs, returns (rows, length, width)."""
    head: nn.Module
    frozen: FrozenLinear | None
    """The head's weights, where they do not learn."""


def forgets_activations(model: "PreTrainedModel") -> bool:
    """Return whether gradient checkpointing is on."""
    # transformers 5 renames the attribute within its major version.
    new, old = "is_activation_checkpointing", "is_gradient_checkpointing"
    return bool(getattr(model, new if hasattr(type(model), new) else old))


def frozen_linears(model: nn.Module) -> list[FrozenLinear]:
    """Return every linear layer without a trainable tensor, adapted ones' base layers included."""
    found = (frozen_linear(module) for module in model.modules())
    return [linear for linear in found if linear is not None]


def frozen_linear(module: nn.Module) -> FrozenLinear | None:
    """Return a module's weights if it is a linear layer that does not learn."""
    weight: Tensor
    if type(module) is nn.Linear or isinstance(module, QuantizedLinear):
        weight = module.weight
    elif is_transposed(module):
        weight = module.get_parameter("weight").t()
    else:
        return None
    if any(p.requires_grad for p in module.parameters()):
        return None
    packed = module if isinstance(module, QuantizedLinear) else None
    bias = dict(module.named_parameters()).get("bias")
    return FrozenLinear(module, weight.detach(), bias, packed)


def frozen_norms(model: nn.Module) -> list[FrozenNorm]:
    """Return every plain root-mean-square norm that does not learn."""
    found = (_frozen_norm(module) for module in model.modules())
    return [norm for norm in found if norm is not None]


@torch.no_grad()
def _frozen_norm(module: nn.Module) -> FrozenNorm | None:
    """Return a norm whose factors are its weight, or one more as Gemma's are: names do not tell, so it is asked."""
    own = dict(module.named_parameters())
    weight = own.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or len(own) > 1:
        return None
    if weight.requires_grad or weight.dim() != 1 or not isinstance(eps, float):
        return None
    x = torch.linspace(-2, 3, len(weight), device=weight.device).to(weight.dtype)[None]
    normed = x.float() * (x.float().square().mean() + eps).rsqrt()
    try:
        got = module(x).float()
    except (RuntimeError, TypeError):  # it takes more than vectors
        return None
    for factors in (weight.float(), 1 + weight.float()):
        if (got - normed * factors).norm() < 0.01 * got.norm():
            return FrozenNorm(module, factors, eps)
    return None


def embedding(model: "PreTrainedModel") -> nn.Module:
    """Return the layer that tokens enter by."""
    table: nn.Module = model.get_input_embeddings()
    return table


def learns_adapters_only(model: nn.Module) -> bool:
    """Return whether nothing of the model learns but adapters of any kind."""
    learning = (name for name, p in model.named_parameters() if p.requires_grad)
    return all(_ADAPTER.search(name) for name in learning)


def adapted_layer(name: str) -> str:
    """Return the name of the layer that a tensor of an adapter sits on; of other tensors, their own."""
    return _ADAPTER.split(name)[0]


def is_transposed(module: nn.Module) -> bool:
    """Return whether this is GPT-2's linear layer, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def is_adapted(module: nn.Module) -> bool:
    """Return whether this is a linear layer with a low-rank adapter."""
    from peft.tuners.lora import Linear

    return isinstance(module, Linear)


def lora_layers(model: nn.Module) -> list[LoRALayer]:
    """Return the adapted layers, if plain low-rank adapters of linear layers are all that learns; else nothing."""
    layers = plain_layers(model)
    covered = {f"{layer.name}.lora_{x}.weight" for layer in layers for x in "AB"}
    tuned = {clean(name) for name, p in model.named_parameters() if p.requires_grad}
    return layers if covered == tuned else []


def plain_layers(model: nn.Module) -> list[LoRALayer]:
    """Return the layers with a plain low-rank adapter, whatever else learns; nothing where one is not plain."""
    layers: list[LoRALayer] = []
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    for full_name, module in modules:
        if not is_adapted(module):
            continue
        base = frozen_linear(module.get_base_layer())
        if base is None or not _is_plain(module):
            return []
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        scaling = float(module.scaling["default"])
        layers.append(LoRALayer(clean(full_name), module, base, scaling, a, b))
    return layers


def adapted_layers(model: nn.Module) -> Sequence[AdaptedLayer]:
    """Return the adapted layers, if adapters of one kind on linear layers are all that learns; else nothing."""
    scaled = _ia3_layers(model)
    projected = _vera_layers(model)
    cores = core_layers(model)
    covered = {f"{layer.name}.ia3_l" for layer in scaled}
    covered |= {f"{layer.name}.lora_B.core" for layer in cores}
    covered |= {f"{layer.name}.vera_lambda_{x}" for layer in projected for x in "bd"}
    tuned = {clean(name) for name, p in model.named_parameters() if p.requires_grad}
    if covered and covered == tuned:
        return scaled or projected or cores
    return lora_layers(model)


def _ia3_layers(model: nn.Module) -> list[IA3Layer]:
    from peft.tuners.ia3 import Linear

    found = [(clean(n), m) for n, m in model.named_modules() if isinstance(m, Linear)]
    bases = [(n, m, frozen_linear(m.get_base_layer())) for n, m in found if not m.merged]
    return [IA3Layer(n, m, base, bool(m.is_feedforward)) for n, m, base in bases if base]


def _vera_layers(model: nn.Module) -> list[VeRALayer]:
    from peft.tuners.vera import Linear

    layers = []
    for name, module in model.named_modules():
        base = frozen_linear(module.get_base_layer()) if isinstance(module, Linear) else None
        if base is None or module.merged:
            continue
        a, b = module.vera_A["default"], module.vera_B["default"]
        parts = a[:, : module.in_features], b[: module.out_features]
        layers.append(VeRALayer(clean(name), module, base, *parts))
    return layers


def core_layers(model: nn.Module) -> list[CoreLayer]:
    """Return the layers whose adapter has a core; nothing where one is on no plain linear layer."""
    layers = []
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    for full_name, module in modules:
        if not is_adapted(module) or not hasattr(module.lora_B["default"], "core"):
            continue
        base, inner = frozen_linear(module.get_base_layer()), module.lora_B["default"]
        if base is None or module.merged:
            return []
        scaling, a = float(module.scaling["default"]), module.lora_A["default"].weight
        layers.append(CoreLayer(clean(full_name), module, base, scaling, a, inner.b))
    return layers


def _is_plain(module: Any) -> bool:
    # A variant is what DoRA and its like replace the product with, a core what LoRA-XS has within B.
    plain = not module.lora_variant and not hasattr(module.lora_B["default"], "core")
    return plain and not module.merged and not any(module.lora_bias.values())


def is_sharded(model: nn.Module) -> bool:
    """Return whether the model's weights are split over processes, see `models.sharding`."""
    return any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)


@torch.no_grad()
def readout(model: "PreTrainedModel") -> Readout | None:
    """Return the model in two, or nothing where its logits are not exactly head(hidden state).

    Soft caps and scales on logits differ by architecture, so the model itself is asked: two short rows must give
    the same bits both ways.
    """
    head, backbone = _output_of(model), getattr(model, "base_model", None)
    if is_sharded(model):
        return None  # layers get their weights where the model itself is called
    if head is None or backbone is None or backbone is model:
        return None

    def hidden(**inputs: Tensor | bool) -> Tensor:
        states: Tensor = backbone(**inputs).last_hidden_state
        return states

    known = _SPLIT.get(model)
    if known is None or known[0] is not head:
        known = _SPLIT[model] = head, _is_split(model, hidden, head)
    return Readout(hidden, head, frozen_linear(head)) if known[1] else None


def _is_split(model: "PreTrainedModel", hidden: Callable[..., Tensor], head: nn.Module) -> bool:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        ids = plain_ids(model, 16).view(2, 8)
        whole = model(input_ids=ids, use_cache=False).logits
        return torch.equal(whole, head(hidden(input_ids=ids, use_cache=False)))
    except (RuntimeError, TypeError, AttributeError):  # something stands between the two
        return False
    finally:
        for module, training in modes:
            module.training = training


def _output_of(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = find() if find else None
    return head


def vocabulary(model: "PreTrainedModel") -> int:
    """Return how many tokens a model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


@torch.no_grad()
def keeps_rows_apart(model: "PreTrainedModel") -> bool:
    """Return whether rows that share one, told apart by positions that start again, are as if they were alone.

    Models differ, so the model is asked: a row must not change by a bit with what stands before it, and must be
    what it is alone, up to rounding.
    """
    ids = plain_ids(model, 13)
    ids, other = ids[:8], torch.cat([ids[8:], ids[5:8]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=model.device)
    mode = model.training
    model.eval()
    try:
        shared, changed = (
            model(input_ids=row[None], position_ids=positions, use_cache=False).logits[0, 5:]
            for row in (ids, other)
        )
        alone = model(input_ids=ids[None, 5:], use_cache=False).logits[0]
    except TypeError:  # it takes no positions
        return False
    finally:
        model.train(mode)
    far = (shared - alone).float().norm() / alone.float().norm()
    low = alone.dtype in (torch.bfloat16, torch.float16)
    return torch.equal(shared, changed) and bool(far < (0.03 if low else 1e-4))


_NAMED = 6
"""Groups of names that a sentence holds."""


def numberless(name: str) -> str:
    """Return a name with a star for each number: what layers and experts have in common."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def listed_groups(names: Collection[str]) -> str:
    """Return the names for a sentence, those that differ in numbers as one with their count."""
    groups: dict[str, int] = {}
    for name in sorted(names):
        groups[numberless(name)] = groups.get(numberless(name), 0) + 1
    return listed([f"{n} ({count})" if count > 1 else n for n, count in groups.items()])


def listed(groups: Sequence[str]) -> str:
    """Return the first few and how many more there are."""
    rest = len(groups) - _NAMED
    return ", ".join(groups[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
