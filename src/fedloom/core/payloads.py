"""What messages hold, for many clients at once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from fedloom.core.protocols import ClientId, Metrics, Payload, Reply, Round


class NoReplies(ValueError):
    """A mean of nothing: the round is skipped."""


def to_all(round: Round, payload: Payload) -> Mapping[ClientId, Payload]:
    """Send one payload to the whole cohort: one object, so that it is encoded and evaluated once."""
    return dict.fromkeys(round.cohort, payload)


def once_each(
    payloads: Mapping[ClientId, Payload],
    key: Callable[[ClientId], float],
    fn: Callable[[Payload, float], Payload],
) -> Mapping[ClientId, Payload]:
    """Apply fn(payload, key(client)) once for every distinct pair, so that shared payloads stay shared."""
    made: dict[tuple[int, float], Payload] = {}
    for client, payload in payloads.items():
        pair = (id(payload), key(client))
        if pair not in made:
            made[pair] = fn(payload, pair[1])
    return {client: made[id(payload), key(client)] for client, payload in payloads.items()}


def accumulator(tensor: Tensor) -> Tensor:
    """Return zeros of a tensor's shape, in at least float32."""
    return torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32))


def mean_upload(replies: Iterable[Reply]) -> Payload:
    """Return the weighted mean of every group.

    One pass over the replies, one accumulator in at least float32: memory does not grow with the cohort, and
    half-precision uploads do not lose the small ones.

    Raises:
        NoReplies: where nobody replied, or all weights are zero.
    """
    total: dict[str, dict[str, Tensor]] = {}
    weights = 0.0
    for reply in replies:
        for group, params in reply.upload.items():
            sums = total.setdefault(group, {})
            for name, tensor in params.items():
                if name not in sums:
                    sums[name] = accumulator(tensor)
                sums[name].add_(tensor, alpha=reply.weight)
        weights += reply.weight
    if not weights:
        raise NoReplies("no client replied")
    for tensors in total.values():
        for tensor in tensors.values():
            tensor.mul_(1 / weights)
    return total


def mean_metrics(told: Sequence[Metrics]) -> dict[str, float]:
    """Return what several models told of a round as one: of each metric the mean of those that told it."""
    names = dict.fromkeys(name for metrics in told for name in metrics)
    return {name: fmean(metrics[name] for metrics in told if name in metrics) for name in names}
