"""A client half run on no model at all: what a reply must look like, and how many bytes it will take.

Because work is data, the server can answer it with stand-ins. The result is the schema an upload is checked against, and
the forecast of `plan`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fedloom.client.worker import client_half
from fedloom.core.protocols import Algorithm, Payload, Refusal, Reply, Task
from fedloom.core.standin import play

Schema = Mapping[tuple[str, str], tuple[torch.dtype, torch.Size]]


def rehearse(algorithm: Algorithm[Any], task: Task, *, noise: float = 0.0) -> Reply:
    """Return the reply of a client without memory whose training moves by `noise` (a standard deviation)."""
    return play(client_half(algorithm, task, {}), task, noise=noise)


def schema(payload: Payload) -> Schema:
    """Return dtype and shape of every tensor."""
    return {
        (group, name): (t.dtype, t.shape)
        for group, params in payload.items()
        for name, t in params.items()
    }


def check(upload: Payload, expected: Schema) -> None:
    """Refuse an upload that is not what was asked for, naming the field.

    Raises:
        Refusal: for a missing, extra or wrongly shaped tensor, and for one that holds NaN or infinity.
    """
    found = schema(upload)
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            raise Refusal(
                f"upload {'/'.join(key)}: expected {_said(expected.get(key))}, got {_said(found.get(key))}"
            )
    for group, params in upload.items():
        for name, t in params.items():
            if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                raise Refusal(f"upload {group}/{name} is not finite")


def _said(kind: tuple[torch.dtype, torch.Size] | None) -> str:
    return "nothing" if kind is None else f"{str(kind[0]).removeprefix('torch.')} {tuple(kind[1])}"
