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
