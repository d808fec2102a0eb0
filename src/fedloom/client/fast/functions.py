"""Hand-written derivatives for layers whose weights do not learn."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fedloom.objectives.head import Product


def frozen_linear(x: Tensor, product: Product) -> Tensor:
    """Return x W^T; its derivative needs the weight only."""
    out: Tensor = _FrozenLinear.apply(x, product)  # type: ignore[no-untyped-call]  # torch's own
    return out


def lora_linear(x: Tensor, product: Product, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return x W^T + scaling x A^T B^T, with its own A and B for each lane's rows.

    Args:
        x: (rows, ..., in), as many rows for each lane, lane by lane; in the type of W, which A and B need not have.
        product: with W.
        a: (lanes, rank, in).
        b: (lanes, out, rank).
        scaling: of the update.
    """
    out: Tensor = _LoRALinear.apply(x, product, a, b, scaling)  # type: ignore[no-untyped-call]  # torch's own
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, in the type of x and rounded to it once; the weight does not learn.

    Args:
        x: (..., width) in half precision.
        weight: (width,) float32.
        eps: added to the mean.
    """
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]  # torch's own
    return out


class _RMSNorm(Function):
    # Between one widening and one rounding everything happens in place; kept is what came in, in half precision.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.float32, copy=True)
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return wide.mul_(scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, wide = x.float() * scale, gradient.float() * weight
        along = (wide * normed).mean(-1, keepdim=True)
        return wide.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype), None, None


class _FrozenLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product) -> Tensor:
        ctx.product = product
        return product.forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return ctx.product.backward(gradient.contiguous()), None


class _LoRALinear(Function):
    # The update is added in place to the frozen product. Narrow products are kept as (lanes, rank, rows): with the
    # short side in front they take a quarter to a half of the time. They are made in the type of A and B: beside
    # float32 adapters, what is kept for the backward pass stays in half precision and is widened where it is used.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: Product, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        out = product.forward(x)
        rows = x.reshape(len(a), -1, x.shape[-1])
        narrow = torch.bmm(a, rows.to(a.dtype).mT)
        _add_product_(out.view(len(a), -1, out.shape[-1]), narrow.mT, b.mT, scaling)
        ctx.save_for_backward(rows, a, b, narrow)
        ctx.product, ctx.scaling = product, scaling
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        rows, a, b, narrow = ctx.saved_tensors
        gradient = gradient.contiguous()
        by_lane = gradient.view(len(a), -1, gradient.shape[-1]).to(a.dtype)
        to_b = torch.bmm(narrow, by_lane).mT.mul(ctx.scaling)
        to_narrow = torch.bmm(b.mT, by_lane.mT).mul_(ctx.scaling)
        to_a = torch.bmm(to_narrow, rows.to(a.dtype))
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = ctx.product.backward(gradient)
            _add_product_(to_x.view(len(a), -1, to_x.shape[-1]), to_narrow.mT, a, 1.0)
        return to_x, None, to_a, to_b, None


def _add_product_(to: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale left @ right, rounded to the type of `to` where that is another."""
    if to.dtype == left.dtype:
        torch.baddbmm(to, left, right, alpha=scale, out=to)
    else:
        to.add_(torch.bmm(left, right).to(to.dtype), alpha=scale)
