"""The head of a model whose weights do not learn: its loss and derivative at once, for a few rows of logits at a time."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

CHUNK = 64
"""Rows of logits at a time on a CPU: they stay in its cache."""


class Product(Protocol):
    """Multiplication with one frozen weight (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T, (..., in) -> (..., out), fresh."""
        ...

    def backward(self, gradient: Tensor) -> Tensor:
        """Return g W, (..., out) -> (..., in), fresh."""
        ...


def chunk_rows(x: Tensor, *, learning: bool = True) -> int:
    """Return how many rows of logits to make at a time.

    Without a derivative there are no shares beside the logits, so twice as many take as much; a large vocabulary's
    weights are then read half as often.
    """
    rows = CHUNK if x.device.type == "cpu" else 16 * CHUNK
    return rows if learning else 2 * rows


def fused_cross_entropy(
    x: Tensor, product: Product, bias: Tensor | None, targets: Tensor, *, times: int = 1
) -> Tensor:
    """Return the cross-entropy (n,) of a head's logits for x (n, width); logits live for a few rows at a time.

    Where x is in half precision the two products are, and everything between them is in float32. `times` as many rows as
    usual are taken at once, for a product that is slow at few.
    """
    rows = times * chunk_rows(x)
    out: Tensor = _FusedCrossEntropy.apply(x, product, bias, targets, rows)  # type: ignore[no-untyped-call]  # torch's own
    return out


class _FusedCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: Product, bias: Tensor | None, targets: Tensor, chunk: int
    ) -> Tensor:
        learning = ctx.needs_input_grad[0]
        sums = torch.promote_types(x.dtype, torch.float32)
        losses, to_x = x.new_empty(len(x), dtype=sums), torch.empty_like(x) if learning else None
        for begin in range(0, len(x), chunk):
            some, wanted = slice(begin, begin + chunk), targets[begin : begin + chunk, None]
            logits = product.forward(x[some]).to(sums)
            if bias is not None:
                logits.add_(bias)
            shares = logits.softmax(1)
            # log(sum(exp(logits))), from the largest share, which cannot underflow.
            total = logits.amax(1, keepdim=True) - shares.amax(1, keepdim=True).log()
            chosen = logits.gather(1, wanted)
            losses[some] = (total - chosen)[:, 0]
            if to_x is not None:
                shares.scatter_add_(1, wanted, torch.full_like(chosen, -1.0))
                to_x[some] = product.backward(shares.to(x.dtype))
        ctx.save_for_backward(to_x)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (to_x,) = ctx.saved_tensors
        return (to_x * gradient[:, None]).to(to_x.dtype), None, None, None, None
