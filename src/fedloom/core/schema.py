"""Which tensors a payload holds: all that may follow from nobody's data, and is known before a message is read."""

import math
from collections.abc import Mapping

import torch

from fedloom.core.protocols import ClientError, Payload

Schema = Mapping[tuple[str, str], tuple[torch.dtype, torch.Size]]
"""Type and shape by group and name."""


def schema(payload: Payload) -> Schema:
    """Return dtype and shape of every tensor."""
    return {
        (group, name): (t.dtype, t.shape)
        for group, params in payload.items()
        for name, t in params.items()
    }


def num_bytes(expected: Schema) -> int:
    """Return the memory that all tensors take."""
    return sum(dtype.itemsize * shape.numel() for dtype, shape in expected.values())


def difference(found: Schema, expected: Schema) -> str | None:
    """Say the first missing, extra or wrongly shaped tensor; None where all is as expected."""
    if found == expected:
        return None
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            return f"{_name(key)}: expected {_text(expected.get(key))}, got {_text(found.get(key))}"
    return None


def check_finite(upload: Payload) -> None:
    """Refuse an upload that holds NaN or infinity, naming the field.

    Raises:
        ClientError: for the first such tensor.
    """
    for group, params in upload.items():
        for name, t in params.items():
            # A finite sum has finite terms and is found in a fifth of the time; a sum that is not may have them too.
            sound = not t.is_floating_point() or math.isfinite(t.sum()) or torch.isfinite(t).all()
            if not sound:
                raise ClientError(f"upload {group}/{name} is not finite")


def _text(kind: tuple[torch.dtype, torch.Size] | None) -> str:
    return "nothing" if kind is None else f"{str(kind[0]).removeprefix('torch.')} {tuple(kind[1])}"


def _name(key: tuple[str, str]) -> str:
    """Return a name of a stranger's as one short line of plain characters."""
    return ascii("/".join(key))[1:-1][:120]
