"""A client half run on no model at all: what a reply must look like, and how many bytes it will take.

Because work is data, the server can answer it with stand-ins. The result is the schema an upload is checked against, and
the forecast of `plan`.
"""

import math
from typing import Any

import torch

from fedloom.client.worker import client_half
from fedloom.core.protocols import Algorithm, ClientError, Payload, Reply, Task
from fedloom.core.standin import play


def rehearse(algorithm: Algorithm[Any], task: Task, *, noise: float = 0.0) -> Reply:
    """Return the reply of a client without memory whose training moves by `noise` (a standard deviation)."""
    return play(client_half(algorithm, task, {}), task, noise=noise)


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
