"""A client's own model, kept by the client: the shared one as it is now, and how far its own way it is from there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedloom.core.params import sub, zeros_like
from fedloom.core.protocols import Params, Payload


def in_order(params: Params) -> Sequence[str]:
    """Return the names that numbers by tensor are in the order of."""
    return sorted(params)


def noise_of(update: Params, again: Params) -> Tensor:
    """Return half the squared distance of two updates that differ by noise alone, (tensors,) float64."""
    apart = ((update[name] - again[name]).double() for name in in_order(update))
    return torch.tensor([float(t.square().sum()) / 2 for t in apart], dtype=torch.float64)


def own_model(download: Payload, client_state: Payload) -> Params:
    """Return the model of a client: the shared one itself where it never trained.

    Args:
        download: `params`, the shared model; `pooling` with `mu`, (tensors,) float64, the share of its own deviation that a
            client keeps of each tensor, and `moves`, how many rounds the shared model has gone through.
        client_state: With what `with_update` returned when the client last trained.
    """
    params, pooling = download["params"], download["pooling"]
    if "pooling_update" not in client_state:
        return params
    rounds = int(pooling["moves"]) - int(client_state["pooling_moves"]["moves"])
    shares = dict(zip(in_order(params), pooling["mu"].tolist(), strict=True))
    own = dict(params)
    for name, update in client_state["pooling_update"].items():
        deviation = client_state["pooling_ahead"][name]
        if rounds > 0:  # else its reply came to nothing, and nobody moved
            moved = (params[name] - client_state["pooling_sent"][name]) / rounds
            deviation = torch.add(deviation, update - moved, alpha=shares[name])
        own[name] = params[name] + deviation
    return own


def with_update(download: Payload, own: Params, update: Params) -> Payload:
    """Return what a client keeps of a round: the shared model, its deviation from that, and what it learnt.

    Args:
        download: As `own_model` takes it.
        own: The client's own model, from which it trained.
        update: What it sends.
    """
    sent = {name: download["params"][name] for name in update}
    alike = own is download["params"]
    return {
        "pooling_sent": sent,
        "pooling_ahead": zeros_like(sent) if alike else sub({n: own[n] for n in update}, sent),
        "pooling_update": update,
        "pooling_moves": {"moves": download["pooling"]["moves"]},
    }
