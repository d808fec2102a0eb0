"""Factors that start as the largest singular directions of their layer's weight, which keeps the rest.

PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models. Meng, Wang, Zhang, NeurIPS 2024
(arXiv:2404.02948), equations 2-4: A = S^(1/2) V^T and B = U S^(1/2), with the scale alpha / rank taken out of both alike.
Deviation: signs are canonical and everything is computed in float64, so that all clients begin with the same bits.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.models.introspection import plain_layers


@torch.no_grad()
def residual_(model: nn.Module) -> dict[str, Tensor]:
    """Move the largest directions of every adapted weight into its factors, in place; return those factors by name."""
    start: dict[str, Tensor] = {}
    for layer in plain_layers(model):
        rank, weight = layer.a.shape[0], layer.base.weight
        a, b = principal_factors(weight, rank)
        layer.a.data.copy_(a / layer.scaling**0.5)
        layer.b.data.copy_(b / layer.scaling**0.5)
        # Of the factors as they are rounded, so that the sum is the weight as it was.
        weight.sub_(layer.scaling * (layer.b.double() @ layer.a.double()))
        start[f"{layer.name}.lora_A.weight"] = layer.a.clone()
        start[f"{layer.name}.lora_B.weight"] = layer.b.clone()
    return start


def beside_the_start(
    values: Mapping[str, Tensor], start: Mapping[str, Tensor], config: Any
) -> tuple[dict[str, Tensor], Any]:
    """Return values and configuration of an adapter on the base weights as they were: [B -B_0] [A; A_0], twice the rank."""
    doubled = dict(values)
    for name, before in start.items():
        is_a, now = name.endswith("lora_A.weight"), values[name].cpu()
        both = [now, before.to(now)] if is_a else [now, -before.to(now)]
        doubled[name] = torch.cat(both, dim=0 if is_a else 1)
    config.r *= 2
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    return doubled, config


def principal_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank), float64, whose product is the best of its rank: S^(1/2) V^T and U S^(1/2)."""
    u, product = _singular(weight, rank)
    root = product.norm(dim=1).sqrt()[:, None]
    return product / root.clamp(min=torch.finfo(torch.float64).tiny), u * root.T


def principal_directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return V^T (rank, in) and U (out, rank), float64, of the largest singular values."""
    u, product = _singular(weight, rank)
    return product / product.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny), u


def _singular(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U (out, rank) and S V^T (rank, in), float64.

    By the eigenvectors of the smaller Gram matrix; the entry of a column of U that is largest is positive.
    """
    w = weight.detach().cpu().double()
    wide = w.shape[0] <= w.shape[1]
    vectors = torch.linalg.eigh(w @ w.T if wide else w.T @ w).eigenvectors[:, -rank:].flip(1)
    if not wide:
        vectors = w @ vectors
        vectors = vectors / vectors.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    u = vectors * torch.where(largest < 0, -1.0, 1.0)
    return u, u.T @ w
