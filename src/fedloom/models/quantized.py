"""Linear layers whose frozen weight is held in few bits, and unpacked for one product at a time."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fedloom.models.schemes import Scheme, identity_of


class QuantizedLinear(nn.Linear):
    """A frozen linear layer in few bits, and beside it a float32 update, where there is one."""

    def __init__(self, layer: nn.Linear, scheme: Scheme) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scheme = scheme
        # Devices may round otherwise; the bits are those of the CPU on all of them.
        packed = scheme.pack(layer.weight.detach().to("cpu", torch.float32))
        device, levels = layer.weight.device, packed.pop("weight").flatten()
        rows = self.out_features if levels.numel() % self.out_features == 0 else 1
        self.weight = nn.Parameter(levels.view(rows, -1).to(device), requires_grad=False)
        for name, values in packed.items():
            self.register_buffer(name, values.to(device))
        self.bias = layer.bias
        self.gain = 1.0
        """What the frozen weight is multiplied by."""
        self.side: tuple[Tensor, Tensor] | Tensor | None = None
        """U (out, R) and V (in, R): the layer computes with its weight plus U V^T; or that product itself."""

    @property
    def shape(self) -> torch.Size:
        """Return what its weight has unpacked, (out, in)."""
        return torch.Size((self.out_features, self.in_features))

    @property
    def packed(self) -> Mapping[str, Tensor]:
        """Return all that is held of the weight, by name."""
        beside = {name: values for name, values in self._buffers.items() if values is not None}
        return {"weight": self.weight.detach(), **beside}

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the frozen weight, fresh, (out, in)."""
        shape = self.out_features, self.in_features
        weight = self.scheme.unpack(self.packed, shape, dtype)
        return weight if self.gain == 1 else weight.mul_(self.gain)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, (..., in) -> (..., out), in the type of x."""
        out: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]  # torch's own
        out = self.beside(x, out)
        bias = self._parameters.get("bias")
        return out if bias is None else out + bias

    def beside(self, x: Tensor, out: Tensor) -> Tensor:
        """Return a product with the frozen weight, and what the update adds to it."""
        if self.side is None:
            return out
        if isinstance(self.side, Tensor):
            return (out.float() + nn.functional.linear(x.float(), self.side)).to(out.dtype)
        u, v = self.side
        return (out.float() + (x.float() @ v) @ u.mT).to(out.dtype)

    def whole(self) -> Tensor:
        """Return the weight with its update, (out, in) float32."""
        weight = self.unpacked(torch.float32)
        if self.side is None:
            return weight
        if isinstance(self.side, Tensor):
            return weight + self.side
        return torch.addmm(weight, self.side[0], self.side[1].mT)


class _Product(Function):
    # The float copy of the weight lives for one product, forwards and backwards.
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.unpacked(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.unpacked(gradient.dtype), None


def quantize_(model: nn.Module, scheme: Scheme) -> int:
    """Put every linear layer of a model, or of a part of one, into few bits, in place, and return how many; no output head."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    count = 0
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedLinear(module, scheme))
            count += 1
    return count


def dequantize_(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every layer in few bits be a plain one with the weight that it computes with, in place."""
    for name, module in quantized_layers(model).items():
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(module.whole().to(dtype), requires_grad=False)
        plain.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the layers in few bits, by name."""
    found = model.named_modules()
    return {name: module for name, module in found if isinstance(module, QuantizedLinear)}


def scheme_of(model: nn.Module) -> Scheme | None:
    """Return how some layers are held in few bits; None where none is."""
    return next((layer.scheme for layer in quantized_layers(model).values()), None)


def check_unquantized(model: nn.Module, what: str) -> None:
    """Refuse what takes whole weights where some are in few bits; `what` says what needs them, and why.

    Raises:
        ValueError: with the setting.
    """
    scheme = scheme_of(model)
    if scheme is not None:
        raise ValueError(f"model.quantize must be none {what}, got {scheme.name}")


def unpacked_shapes(model: nn.Module) -> Mapping[int, torch.Size]:
    """Return the shape (out, in) of every packed weight, by the id of its parameter."""
    return {id(layer.weight): layer.shape for layer in quantized_layers(model).values()}


def num_weights(model: nn.Module) -> int:
    """Return how many weights a model has, packed ones counted one by one; tied tensors once."""
    shapes = unpacked_shapes(model)
    return sum(shapes.get(id(p), p.shape).numel() for p in model.parameters())


def quantized_bytes(model: nn.Module) -> tuple[int, int]:
    """Return how many weights layers in few bits have, and the bytes they take."""
    layers = quantized_layers(model).values()
    held = sum(values.nbytes for layer in layers for values in layer.packed.values())
    return sum(layer.shape.numel() for layer in layers), held


def quantized_identity(model: nn.Module) -> Mapping[str, str]:
    """Return what both sides must have in common where some layers are in few bits, see `spaces.handshake`; else nothing."""
    scheme = scheme_of(model)
    if scheme is None:
        return {}
    digest = hashlib.sha256()
    for layer in quantized_layers(model).values():
        for values in layer.packed.values():
            digest.update(values.cpu().contiguous().view(torch.uint8).numpy().data)
    return {**identity_of(scheme), "packed": digest.hexdigest()}
