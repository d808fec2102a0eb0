"""Which of the fast parts a model and a machine allow, put in place while work runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fedloom.client.fast.functions import chunk_rows, frozen_linear, fused_cross_entropy
from fedloom.client.fast.products import (
    MovingProduct,
    PackedProduct,
    Product,
    TorchProduct,
    packed_is_faster,
)
from fedloom.client.local_settings import LocalSettings
from fedloom.client.objectives import Batch, Loss, ReferenceLoss
from fedloom.data.classes import decide
from fedloom.data.tokens import IGNORED
from fedloom.models.introspection import (
    FrozenLinear,
    Readout,
    frozen_linears,
    keeps_rows_apart,
    readout,
)

Chosen = Literal["onednn", "torch", "reference"]
PACKED_BYTES = 4 * 2**30
"""Auto packs no more than this: packed copies of both directions come on top of the weights themselves."""


def choose_kernels(local: LocalSettings, model: nn.Module) -> Chosen:
    """Return what local.kernels comes to on this machine.

    Raises:
        ValueError: where onednn is asked for and cannot be had.
    """
    if local.kernels in ("torch", "reference"):
        return local.kernels
    first = next(model.parameters())
    packed_bytes = sum(2 * layer.weight.nbytes for layer in frozen_linears(model))
    possible = (
        first.device.type == "cpu" and first.dtype == torch.float32 and local.precision == "float32"
    )
    if local.kernels == "auto":
        wanted = possible and 0 < packed_bytes <= PACKED_BYTES
        return "onednn" if wanted and packed_is_faster() else "torch"
    if not possible:
        raise ValueError(
            "local.kernels onednn needs a float32 model on a CPU,"
            f" got {str(first.dtype).removeprefix('torch.')} on {first.device.type}"
        )
    return "onednn"


@dataclass(frozen=True)
class FastPath:
    """The products and the loss in use, for one model."""

    kernels: Chosen
    products: Mapping[int, Product]
    """Of every frozen linear layer, by id of its module."""
    layers: tuple[FrozenLinear, ...]
    packs: bool
    """Whether rows of a step may share a row of the batch."""
    loss: Loss = field(repr=False)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let frozen linear layers use packed products; the model is as it was afterwards."""
        with ExitStack() as stack:
            if self.kernels == "onednn":
                for layer in self.layers:
                    stack.enter_context(
                        replaced_forward(
                            layer.module, _forward_of(layer, self.products[id(layer.module)])
                        )
                    )
            yield


def make_fast(
    model: nn.Module,
    local: LocalSettings,
    classes: Sequence[int] = (),
    *,
    moving: bool = False,
) -> FastPath:
    """Look at the model once and return the fastest parts it allows.

    Args:
        model: with frozen layers.
        local: says which kernels.
        classes: a classifier's tokens; empty: the whole vocabulary.
        moving: whether frozen weights are others from one forward to the next, so that nothing may be kept of them.
    """
    kernels = choose_kernels(local, model)
    layers = tuple(frozen_linears(model))
    make = PackedProduct if kernels == "onednn" else TorchProduct
    products: dict[int, Product] = {
        id(layer.module): _moving(layer) if moving else make(layer.weight) for layer in layers
    }
    parts = None if kernels == "reference" else readout(model)
    loss: Loss = ReferenceLoss(model, classes)
    if parts is not None:
        fixed = parts.frozen is not None and not moving
        product = products[id(parts.head)] if fixed else None
        loss = TargetLoss(parts, product, classes)
    if local.precision == "bfloat16":
        loss = _Autocast(loss, next(model.parameters()).device.type)
    packs = kernels != "reference" and keeps_rows_apart(model)
    return FastPath(kernels, products, layers, packs, loss)


@dataclass(frozen=True, slots=True)
class TargetLoss:
    """Logits and loss only where a next token is asked for."""

    parts: Readout
    product: Product | None
    classes: Sequence[int] = ()
    """Tokens a classifier decides between; empty: the whole vocabulary."""

    def __call__(self, batch: Batch) -> Tensor:
        labels = batch.labels.flatten()
        at = (labels != IGNORED).nonzero().squeeze(1)
        hidden = self.parts.hidden(**batch.inputs(), use_cache=False).flatten(0, 1)
        chosen, targets = hidden.index_select(0, at), labels[at]
        frozen = self.parts.frozen
        exact = chosen.dtype in (torch.float32, torch.float64)
        product = None if self.classes else self.product
        if frozen is not None and product is not None and exact and not _autocasting(chosen):
            losses = fused_cross_entropy(chosen, product, frozen.bias, targets)
        else:
            # Without a gradient nothing is kept of the logits, so a few rows of them at a time will do.
            size = len(chosen) if torch.is_grad_enabled() else chunk_rows(chosen)
            rows = max(size, 1)
            parts = zip(torch.split(chosen, rows), torch.split(targets, rows), strict=True)
            losses = torch.cat([self._losses(some, wanted) for some, wanted in parts])
        return batch.per_lane(losses, at)

    def _losses(self, chosen: Tensor, targets: Tensor) -> Tensor:
        logits = self.parts.head(chosen)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wide, targets = decide(wide, targets, self.classes)
        return nn.functional.cross_entropy(wide, targets, reduction="none")


@dataclass(frozen=True, slots=True)
class _Autocast:
    loss: Loss
    device_type: str

    def __call__(self, batch: Batch) -> Tensor:
        # The cache keeps low copies of weights for backward passes; without those it only takes memory.
        keep = torch.is_grad_enabled()
        with torch.autocast(self.device_type, torch.bfloat16, cache_enabled=keep):
            return self.loss(batch)


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
        return out if layer.bias is None else out + layer.bias

    return forward


def _moving(layer: FrozenLinear) -> Product:
    return MovingProduct(layer.module, transposed=type(layer.module) is not nn.Linear)


def _autocasting(like: Tensor) -> bool:
    return torch.is_autocast_enabled(like.device.type)
