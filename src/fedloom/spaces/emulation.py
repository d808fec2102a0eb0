"""How far an emulator is from the layers it stands in for, and the way there: FedBiOT's upper level, a batch at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedloom.core.emulation import Distance
from fedloom.core.protocols import Metrics, Params
from fedloom.data.tokens import Example
from fedloom.objectives.batch import Batch, collate
from fedloom.objectives.forward import Forward
from fedloom.spaces.offsite import OffsiteSpace


def gradient(
    space: OffsiteSpace, params: Params, examples: Sequence[Example], distance: Distance
) -> tuple[Params, Metrics]:
    """Return the gradient of the distance on a batch by the emulator's factors, and its parts, `hidden` and `kl`.

    Args:
        space: Whose whole model is here.
        params: Where the layers that learn, and the factors, stand.
        examples: Text of the server's own.
        distance: What is to become less.
    """
    space.load(params)
    _, factors = space.split(dict(zip(space.layout.shapes, space.parameters, strict=True)))
    batch = collate([list(examples)], [1], space.values, pack=False)
    real = _real(batch, examples)
    with torch.no_grad(), space.whole():
        target = _seen(space, batch, real, layers=distance.match == "layers")
    with torch.enable_grad():
        seen = _seen(space, batch, real, layers=distance.match == "layers")
        hidden, kl = _states(seen, target, distance), _kl(seen, target, distance)
        total = distance.hidden * hidden + distance.kd * kl
    slopes = torch.autograd.grad(total, list(factors.values()), materialize_grads=True)
    found = {name: slope.cpu() for name, slope in zip(factors, slopes, strict=True)}
    return found, {"hidden": float(hidden.detach()), "kl": float(kl.detach())}


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one arrangement of the model makes of a batch."""

    states: Sequence[Tensor]
    """(tokens, width) each, padding left out."""
    logits: Tensor
    """(asked, vocabulary)"""


def _real(batch: Batch, examples: Sequence[Example]) -> Tensor:
    """Return which flat places of a batch hold tokens, (rows * length,) bool."""
    lengths = torch.tensor([len(example.ids) for example in examples], device=batch.ids.device)
    places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return (places[None] < lengths[:, None]).flatten()


def _seen(space: OffsiteSpace, batch: Batch, real: Tensor, *, layers: bool) -> _Seen:
    forward, middle = Forward.of(space.model), space.emulator.cut.middle
    with space.emulator.watched() as given:
        logits = forward.logits(batch)
    # Behind the middle is behind its last layer, kept or not.
    behind = given[max(given)]
    states = [*(given[number] for number in middle[:-1]), behind] if layers else [behind]
    return _Seen([each.flatten(0, 1)[real] for each in states], logits)


def _states(seen: _Seen, target: _Seen, distance: Distance) -> Tensor:
    """Return the mean distance of the states."""
    pairs = zip(seen.states, target.states, strict=True)
    if distance.match == "cosine":
        angles = [nn.functional.cosine_similarity(s, t, dim=-1).mean() for s, t in pairs]
        return 1 - torch.stack(angles).mean()
    return torch.stack([(s - t).square().mean() / t.square().mean() for s, t in pairs]).mean()


def _kl(seen: _Seen, target: _Seen, distance: Distance) -> Tensor:
    """Return the mean over tokens of KL(whole model || emulator), softened and scaled back; never below 0."""
    warm = distance.temperature
    ours, theirs = ((each.logits / warm).log_softmax(-1) for each in (seen, target))
    return warm**2 * (theirs.exp() * (theirs - ours)).sum(-1).mean()
