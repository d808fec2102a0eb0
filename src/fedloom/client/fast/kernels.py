"""Which of the fast parts a model and a machine allow, put in place while work runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedloom.client.fast.functions import frozen_linear, lora_linear
from fedloom.client.fast.products import (
    MovingProduct,
    PackedProduct,
    TorchProduct,
    packed_is_faster,
)
from fedloom.client.local_settings import LocalSettings
from fedloom.data.tokens import Example
from fedloom.models.introspection import (
    FrozenLinear,
    LoRALayer,
    frozen_linears,
    keeps_rows_apart,
    lora_layers,
    readout,
)
from fedloom.objectives.batch import Batch
from fedloom.objectives.forward import Forward
from fedloom.objectives.head import Product
from fedloom.objectives.objective import Objective
from fedloom.objectives.sft import DEFAULT

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
    """The products in use for one model, and the way from its clients' examples to their losses."""

    kernels: Chosen
    products: Mapping[int, Product]
    """Of every frozen linear layer, by id of its module."""
    layers: tuple[FrozenLinear, ...]
    adapted: tuple[LoRALayer, ...]
    """Every adapted layer, where plain low-rank adapters are all that learns; nothing for kernels reference."""
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

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let frozen layers use packed products, and adapted ones add to them in place; no gradient is kept."""
        with self.installed(), ExitStack() as stack:
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
    make = PackedProduct if kernels == "onednn" else TorchProduct
    products: dict[int, Product] = {
        id(layer.module): _moving(layer) if moving else make(layer.weight) for layer in layers
    }
    parts = None if kernels == "reference" else readout(model)
    fixed = parts is not None and parts.frozen is not None and not moving
    product = products[id(parts.head)] if parts is not None and fixed else None
    forward = Forward(model, parts, product, low=local.precision == "bfloat16")
    packs = kernels != "reference" and keeps_rows_apart(model)
    adapted = () if kernels == "reference" else tuple(lora_layers(model))
    return FastPath(kernels, products, layers, adapted, packs, forward, objective)


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


def _adapted_forward_of(layer: LoRALayer, product: Product) -> Callable[[Tensor], Tensor]:
    plain: Callable[[Tensor], Tensor] = layer.module.forward

    def forward(x: Tensor) -> Tensor:
        if not x.dtype == layer.a.dtype == layer.base.weight.dtype:
            return plain(x)
        out = lora_linear(x, product, layer.a[None], layer.b[None], layer.scaling)
        return out if layer.base.bias is None else out + layer.base.bias

    return forward


def _moving(layer: FrozenLinear) -> Product:
    return MovingProduct(layer.module, transposed=type(layer.module) is not nn.Linear)
