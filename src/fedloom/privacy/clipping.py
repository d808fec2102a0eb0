"""What one client can add to a sum, and the sum."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.core.params import norm, params_map, scale
from fedloom.core.protocols import Params, Payload
from fedloom.core.sparsity import support
from fedloom.privacy.noise import normals


def clipped(upload: Payload, clip: float) -> tuple[Payload, float]:
    """Return the upload at a joint norm over all groups of at most `clip`, and its norm before.

    One that is not finite is turned to zeros: no factor would bound it.
    """
    size = norm(upload)
    if not math.isfinite(size):
        nothing = {group: params_map(torch.zeros_like, params) for group, params in upload.items()}
        return nothing, size
    if size <= clip:
        return upload, size
    return {group: scale(params, clip / size) for group, params in upload.items()}, size


def moved(downloads: Iterable[Params]) -> Params:
    """Return where any of them is not zero, as bool; nothing, so that all counts, where all are."""
    union: Params = {}
    for params in {id(params): params for params in downloads}.values():
        here = support(params)
        union = params_map(torch.logical_or, union, here) if union else here
    return union if any(bool(t.any()) for t in union.values()) else {}


def within(upload: Payload, mask: Params) -> Payload:
    """Return the upload with zeros where `mask` is False; tensors it does not name stay whole."""
    return {
        group: {n: torch.where(mask[n], t, 0) if n in mask else t for n, t in params.items()}
        for group, params in upload.items()
    }


@dataclass
class NoisySum:
    """Adds uploads up in float64, and noise to their sum."""

    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    dtypes: dict[tuple[str, str], torch.dtype] = field(default_factory=dict)

    def add(self, upload: Payload) -> None:
        """Add one client's upload."""
        for group, params in upload.items():
            for name, tensor in params.items():
                self._add(group, name, tensor)

    def _add(self, group: str, name: str, tensor: Tensor) -> None:
        sums, where = self.sums.setdefault(group, {}), f"{group}/{name} of an upload"
        if not tensor.is_floating_point():
            raise ValueError(
                f"private adds noise to floating-point numbers only, got {tensor.dtype} in {where}"
            )
        if name not in sums:
            sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
            self.dtypes[group, name] = torch.promote_types(tensor.dtype, torch.float32)
        if sums[name].shape != tensor.shape:
            shapes = f"{tuple(sums[name].shape)} and {tuple(tensor.shape)}"
            raise ValueError(f"private needs uploads of one shape, got {shapes} in {where}")
        sums[name].add_(tensor)

    def seal(self, key: bytes, terms: Sequence[int | float | None], *, mask: Params) -> str:
        """Return a keyed hash of the sum to the bit, in any order of names, of where it is and of `terms`."""
        digest = hashlib.blake2b(repr(tuple(terms)).encode(), key=key, person=b"noisy sum")
        for group, sums in sorted(self.sums.items()):
            for name, total in sorted(sums.items()):
                what = (group, name, tuple(total.shape), str(self.dtypes[group, name]))
                digest.update(repr((*what, name in mask)).encode())
                # A sum begins at +0.0, so it has no -0.0 that would be another number to a hash only.
                digest.update(total.reshape(-1).numpy().astype("<f8", copy=False).data)
                if name in mask:
                    digest.update(mask[name].reshape(-1).numpy().data)
        return digest.hexdigest()

    def mean(
        self, denominator: float, *, std: float, key: bytes, path: Sequence[str | int], mask: Params
    ) -> Payload:
        """Return (sum + noise) / denominator, without noise where `mask` is False.

        The noise is that of `key` and `path`, which must not serve another sum: the difference of two
        that share it is without noise.
        """

        def mean(group: str, name: str, total: Tensor) -> Tensor:
            if std:
                noise = normals(key, *path, group, name, shape=total.shape)
                noise = torch.where(mask[name], noise, 0) if name in mask else noise
                total = total.add(noise, alpha=std)
            return (total / denominator).to(self.dtypes[group, name])

        return {
            group: {name: mean(group, name, total) for name, total in sums.items()}
            for group, sums in self.sums.items()
        }
