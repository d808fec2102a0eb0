"""Linear layers in eight bits: a frozen weight as integers with one scale a row, a quarter of float32's bytes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

LEVELS = 127
"""Largest integer of a row, which stands for its largest magnitude."""


class Int8Linear(nn.Linear):
    """A frozen linear layer in int8, and beside it a float32 update, where there is one."""

    scale: Tensor
    """(out,) float32"""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = layer.bias
        self.side: tuple[Tensor, Tensor] | Tensor | None = None
        """U (out, R) and V (in, R): the layer computes with its weight plus U V^T; or that product itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, (..., in) -> (..., out), in the type of x."""
        out: Tensor = _Product.apply(x, self.weight, self.scale)  # type: ignore[no-untyped-call]  # torch's own
        if isinstance(self.side, Tensor):
            out = (out.float() + nn.functional.linear(x.float(), self.side)).to(out.dtype)
        elif self.side is not None:
            u, v = self.side
            out = (out.float() + (x.float() @ v) @ u.mT).to(out.dtype)
        bias = self._parameters.get("bias")
        return out if bias is None else out + bias

    def whole(self) -> Tensor:
        """Return the weight with its update, (out, in) float32."""
        weight = self.weight.float() * self.scale[:, None]
        if self.side is None:
            return weight
        if isinstance(self.side, Tensor):
            return weight + self.side
        return torch.addmm(weight, self.side[0], self.side[1].mT)


class _Product(Function):
    # The float copy of the weight lives for one product, forwards and backwards.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return nn.functional.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype), None, None


def quantize_(model: nn.Module) -> None:
    """Put every linear layer of a model, or of a part of one, into int8, in place; not an output head."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Int8Linear(module))


def is_quantized(model: nn.Module) -> bool:
    """Return whether some layer is in int8."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
