"""Inputs whose gradient is the one that was seen, searched for by gradient descent on them.

Deep Leakage from Gradients. Zhu, Liu, Han, NeurIPS 2019 (arXiv:1906.08935), algorithm 1: a made-up input is moved until its
gradient is the observed one. LAMP: Extracting Text from Gradients with Language Model Priors. Balunovic, Dimitrov,
Jovanovic, Vechev, NeurIPS 2022 (arXiv:2202.08827), equation 2: for text, by the cosine between them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gradient = Callable[[Tensor], Sequence[Tensor]]
"""From an input to the gradient of its loss, with a graph."""


def squared(own: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
    """Return the squared distance of two gradients, as a share of that of the second from 0 (DLG)."""
    total = torch.stack([(a - b).square().sum() for a, b in zip(own, seen, strict=True)]).sum()
    return total / torch.stack([b.square().sum() for b in seen]).sum()


def cosine(own: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
    """Return one minus the mean cosine of each tensor of two gradients (LAMP); a tensor that did not move is left out."""
    pairs = [(a, b) for a, b in zip(own, seen, strict=True) if bool(b.any())]
    each = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0, eps=1e-20) for a, b in pairs]
    return 1 - torch.stack(each).mean()


def polished(gradient: Gradient, seen: Sequence[Tensor], start: Tensor, *, steps: int) -> Tensor:
    """Return an input near `start` whose gradient is nearest to what was seen, by L-BFGS as in DLG."""
    found = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([found], max_iter=steps, line_search_fn="strong_wolfe")
    optimizer.defaults["tolerance_change"] = optimizer.param_groups[0]["tolerance_change"] = 0.0
    optimizer.param_groups[0]["tolerance_grad"] = 0.0

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = squared(gradient(found), seen)
        (found.grad,) = torch.autograd.grad(loss, [found])
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return found.detach()


def matched(
    gradient: Gradient, seen: Sequence[Tensor], start: Tensor, *, steps: int, lr: float
) -> tuple[Tensor, float]:
    """Return the input nearest to what was seen of all that Adam passes through from `start`, and its distance by cosine."""
    found = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([found], lr=lr)
    best, least = start, float("inf")
    for _ in range(steps):
        loss = cosine(gradient(found), seen)
        if (far := float(loss.detach())) < least:
            best, least = found.detach().clone(), far
        (found.grad,) = torch.autograd.grad(loss, [found])
        optimizer.step()
    return best, least
