"""Params cut to what a mask keeps, whole again, and how much that is."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fedloom.core.params import params_map
from fedloom.core.protocols import Metrics, Params


def pick(params: Params, mask: Params) -> Params:
    """Return each tensor's kept entries in their order, 1-D: `mask` says where they lie."""
    return params_map(lambda t, kept: t[kept], params, mask)


def fill(values: Params, mask: Params) -> Params:
    """Return whole tensors of what `pick` returned, +0.0 where nothing was kept."""

    def whole(kept: Tensor, where: Tensor) -> Tensor:
        return torch.zeros(where.shape, dtype=kept.dtype).masked_scatter_(where, kept)

    return params_map(whole, values, mask)


def num_kept(mask: Params) -> int:
    """Return the number of entries that are not zero."""
    return sum(int(t.count_nonzero()) for t in mask.values())


def kept_shares(masks: Iterable[Params]) -> Metrics:
    """Return the share kept of all entries, and of each tensor's: means over the masks, one a client."""
    kept: dict[str, float] = {}
    sizes: dict[str, int] = {}
    counted: dict[int, dict[str, int]] = {}
    alive = []
    for mask in masks:
        # An id is unique only while its object lives.
        alive.append(mask)
        if id(mask) not in counted:
            counted[id(mask)] = {name: int(t.count_nonzero()) for name, t in mask.items()}
        for name, count in counted[id(mask)].items():
            kept[name] = kept.get(name, 0) + count
            sizes[name] = sizes.get(name, 0) + mask[name].numel()
    if not sum(sizes.values()):
        return {}
    tensors = {f"density/{name}": kept[name] / max(size, 1) for name, size in sizes.items()}
    return {"download_density": sum(kept.values()) / sum(sizes.values()), **tensors}
