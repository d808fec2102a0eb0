"""Which of the fast parts a model and a machine allow, put in place while work runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fedloom.client.fast.functions import frozen_linear, lora_linear, rms_norm
from fedloom.client.fast.products import (
    PRODUCTS,
    UNKEPT,
    Kind,
    UnkeptProduct,
    UnpackedForward,
    fastest,
    native,
)
from fedloom.client.local_settings import PACKS, LocalSettings
from fedloom.data.tokens import Example
from fedloom.models.introspection import (
    FrozenLinear,
    FrozenNorm,
    LoRALayer,
    embedding,
    frozen_linears,
    frozen_norms,
    keeps_rows_apart,
    lora_layers,
    readout,
)
from fedloom.models.probe import asked, plain_ids
from fedloom.models.quantized import scheme_of
from fedloom.objectives.batch import Batch
from fedloom.objectives.forward import Forward
from fedloom.objectives.head import Product
from fedloom.objectives.objective import Objective
from fedloom.objectives.sft import DEFAULT

Chosen = Literal[Kind, "reference"]
PACKED_BYTES = 4 * 2**30
"""Auto packs no more than this: packed copies come on top of the weights themselves."""
HALF = (torch.bfloat16, torch.float16)


def choose_kernels(local: LocalSettings, model: nn.Module) -> Chosen:
    """Return what local.kernels comes to on this machine.

    Raises:
        ValueError: where kernels are asked for that a model of this type or place cannot have.
    """
    asked = local.kernels
    if asked in ("torch", "reference"):
        return asked
    first = next(model.parameters())
    if asked == "auto":
        weight_bytes = sum(x.weight.nbytes for x in frozen_linears(model) if x.packed is None)
        timed = first.device.type == "cpu" and first.dtype in (torch.float32, *HALF)
        if not timed or not weight_bytes or local.precision != "float32":
            return "torch"
        return fastest(first.dtype, copies=PACKED_BYTES // weight_bytes)
    possible = HALF if asked == "widened" else (torch.float32, torch.bfloat16)
    if first.device.type != "cpu" or first.dtype not in possible:
        raise ValueError(
            f"local.kernels {asked} needs a {' or '.join(map(_named, possible))} model on a CPU,"
            f" got {_named(first.dtype)} on {first.device.type}"
        )
    return asked


def products_in_words(chosen: Chosen, model: nn.Module) -> str:
    """Return how products with frozen weights are made, for a row of a table; empty where there are none."""
    first, layers = next(model.parameters()), frozen_linears(model)
    if not layers:
        return ""
    named, scheme = _named(first.dtype), scheme_of(model)
    words = {
        "reference": f"the model's own, {named}",
        "torch": f"torch's, {named}",
        "widened": f"torch's in float32, each weight widened from {named} as it is used",
        "onednn_forward": f"oneDNN's, {named}, packed once",
        "onednn": f"oneDNN's, {named}, packed for both directions",
    }
    if scheme is None:
        return words[chosen]
    return f"{words[chosen]}; those in {scheme.name} unpacked once a product, for all clients of a batch"


def slow_type(chosen: Chosen, model: nn.Module) -> str:
    """Return a sentence where this CPU multiplies the model's type slower than float32; empty elsewhere."""
    first = next(model.parameters())
    if first.device.type != "cpu" or first.dtype not in HALF or not frozen_linears(model):
        return ""
    low, high = native(first.dtype), native(torch.float32)
    if low >= high:
        return ""
    named = _named(first.dtype)
    widened = (
        "so frozen weights are widened as they are used, and model.dtype float32 is faster still"
    )
    what = widened if chosen == "widened" else "model.dtype float32 is faster"
    return (
        f"this CPU multiplies {named} {high / low:.1f} times slower than float32"
        f" ({low:.0f} against {high:.0f} GFLOP/s a thread): {what}"
    )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class FastPath:
    """The products in use for one model, and the way from its clients' examples to their losses."""

    kernels: Chosen
    products: Mapping[int, Product]
    """Of every frozen linear layer, by id of its module."""
    layers: tuple[FrozenLinear, ...]
    adapted: tuple[LoRALayer, ...]
    """Every adapted layer, where plain low-rank adapters are all that learns; nothing for kernels reference."""
    norms: tuple[FrozenNorm, ...]
    """Those that are computed at once."""
    wide: nn.Module | None
    """The embedding of a half-precision model that computes in float32 from there on."""
    packs: bool
    """Whether rows of a step may share a row of the batch."""
    forward: Forward
    objective: Objective

    def batches(
        self, steps: Sequence[Sequence[Example]], size: int, like: Tensor
    ) -> Iterator[Batch]:
        """Yield the batches of one optimizer step of each lane, up to `size` examples of a lane in each.

        Args:
            steps: Examples of each lane.
            size: Of a batch.
            like: A tensor with the device and type of the weights.
        """
        counts = [self.objective.count(step) for step in steps]
        for at in range(0, max(map(len, steps)), size):
            some = [step[at : at + size] for step in steps]
            yield self.objective.batch(some, counts, like, pack=self.packs)

    def losses(self, batch: Batch) -> Tensor:
        """Return each lane's share of its step's mean loss, (lanes,), with a graph."""
        return self.objective.losses(self.forward, batch)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let frozen layers compute in the ways chosen; the model is as it was afterwards."""
        with ExitStack() as stack:
            if self.kernels in PACKS:
                for layer in self.layers:
                    stack.enter_context(
                        replaced_forward(
                            layer.module, _forward_of(layer, self.products[id(layer.module)])
                        )
                    )
            for norm in self.norms:
                stack.enter_context(replaced_forward(norm.module, _normed(norm)))
            if self.wide is not None:
                stack.enter_context(replaced_forward(self.wide, _widened(self.wide)))
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let frozen layers use packed products, and adapted ones add to them in place; no gradient is kept."""
        with self.installed(), ExitStack() as stack:
            parts = self.forward.parts
            if parts is not None and parts.frozen is not None and self.kernels not in PACKS:
                stack.enter_context(replaced_forward(parts.head, _of_dense_rows(parts.head)))
            for layer in self.adapted:
                forward = _adapted_forward_of(layer, self.products[id(layer.base.module)])
                stack.enter_context(replaced_forward(layer.module, forward))
            yield


def make_fast(
    model: nn.Module,
    local: LocalSettings,
    objective: Objective = DEFAULT,
    *,
    moving: bool = False,
) -> FastPath:
    """Look at the model once and return the fastest parts it allows.

    Args:
        model: with frozen layers.
        local: says which kernels.
        objective: what is learnt.
        moving: whether frozen weights are others from one forward to the next, so that nothing may be kept of them.
    """
    kernels = choose_kernels(local, model)
    layers = tuple(frozen_linears(model))
    kind: Kind = "torch" if kernels == "reference" else kernels
    parts = None if kernels == "reference" else readout(model)
    head = None if parts is None else parts.head
    products: dict[int, Product] = {
        id(layer.module): _unkept(layer, kind)
        if moving or layer.packed
        else (UNKEPT if layer.module is head else PRODUCTS)[kind](layer.weight)
        for layer in layers
    }
    fixed = parts is not None and parts.frozen is not None and not moving
    product = products[id(parts.head)] if parts is not None and fixed else None
    times = 2 if isinstance(product, UnpackedForward) else 1
    forward = Forward(model, parts, product, local.precision == "bfloat16", times)
    packs = kernels != "reference" and keeps_rows_apart(model)
    adapted = () if kernels == "reference" else tuple(lora_layers(model))
    low = next(model.parameters()).dtype in HALF and not moving and local.precision == "float32"
    norms = tuple(frozen_norms(model)) if low and kernels not in ("widened", "reference") else ()
    fast = FastPath(kernels, products, layers, adapted, norms, None, packs, forward, objective)
    if not low or kernels != "widened":
        return fast
    wide = replace(fast, wide=embedding(model))
    return wide if _computes_wide(wide, model) else fast


@torch.no_grad()
def _computes_wide(fast: FastPath, model: nn.Module) -> bool:
    """Return whether a half-precision model computes the same in float32 where its embedding is widened.

    Layers that insist on the type of their own weights cannot, so the model is asked.
    """
    ids = plain_ids(model, 8)[None]
    with asked(model):
        low: Tensor = model(input_ids=ids, use_cache=False).logits
        try:
            with fast.installed():
                wide: Tensor = model(input_ids=ids, use_cache=False).logits
        except (RuntimeError, TypeError):
            return False
    return wide.dtype == torch.float32 and bool((wide - low).norm() < 0.1 * wide.norm())


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module compute something else for a while."""
    module.forward = forward
    try:
        yield
    finally:
        # Uncovers the method of its class, which an attribute of the instance hides.
        del module.forward


def _forward_of(layer: FrozenLinear, product: Product) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and x.requires_grad
        out = frozen_linear(x, product) if learning else product.forward(x)
        if layer.packed:
            out = layer.packed.beside(x, out)
        return out if layer.bias is None else out + layer.bias

    return forward


def _adapted_forward_of(layer: LoRALayer, product: Product) -> Callable[[Tensor], Tensor]:
    plain: Callable[[Tensor], Tensor] = layer.module.forward

    def forward(x: Tensor) -> Tensor:
        if x.dtype != layer.a.dtype or not (
            layer.base.packed or x.dtype == layer.base.weight.dtype
        ):
            return plain(x)
        out = lora_linear(x, product, layer.a[None], layer.b[None], layer.scaling)
        return out if layer.base.bias is None else out + layer.base.bias

    return forward


def _of_dense_rows(head: nn.Module) -> Callable[[Tensor], Tensor]:
    # Of the last state of each row, a view, torch makes a product a row, and reads the whole weight for each.
    plain = head.forward
    return lambda x: plain(x.contiguous())


def _normed(norm: FrozenNorm) -> Callable[[Tensor], Tensor]:
    return lambda x: rms_norm(x, norm.weight, norm.eps)


def _widened(table: nn.Module) -> Callable[[Tensor], Tensor]:
    plain = table.forward
    return lambda ids: plain(ids).float()


def _unkept(layer: FrozenLinear, kind: Kind) -> Product:
    module, packed = layer.module, layer.packed

    def weight(dtype: torch.dtype) -> Tensor:
        if packed:
            return packed.unpacked(torch.float32 if kind == "widened" else dtype)
        stored = module.get_parameter("weight")
        return stored if type(module) is nn.Linear else stored.t().contiguous()

    return UnkeptProduct(weight, UNKEPT[kind])
