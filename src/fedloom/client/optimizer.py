"""SGD and AdamW over lanes: clients side by side in one matrix, each as if it were alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedloom.client.local_settings import LocalSettings
from fedloom.client.moments import held

Factors = tuple[float, float]
"""What the learning rate and the weight decay of a lane are multiplied by."""
Norms = Callable[[Tensor], Tensor]
"""(lanes, numel) gradients to the norm (lanes,) of each, which may be a part of a longer one."""


def joint_norms(gradients: Tensor) -> Tensor:
    """Return the norm (lanes,) of each lane's whole gradient (lanes, numel)."""
    norms: Tensor = torch.linalg.vector_norm(gradients, dim=1)
    return norms


class Optimizer:
    """SGD or AdamW in the operations and order of torch.optim; element by element, so that lanes never meet."""

    def __init__(
        self,
        local: LocalSettings,
        lr: float,
        values: Tensor,
        mask: Tensor | None,
        norms: Norms = joint_norms,
        factors: Sequence[Factors] = (),
    ) -> None:
        self._local, self._lr, self._norms = local, lr, norms
        self._factors = list(factors) or [(1.0, 1.0)] * len(values)
        number = 2 if local.optimizer == "adamw" else int(local.momentum > 0)
        self._held = [held(local.moments, is_square=at == 1) for at in range(number)]
        # The tensors of each moment, one moment after another.
        self._moments = [t for one in self._held for t in one.zeros(values)]
        # A masked entry stands still, so it must not decay either.
        decays = local.weight_decay > 0 and mask is not None
        self._decaying = [(mask != 0).to(values)] if decays and mask is not None else []
        self._counts = [0] * len(values)

    def step_(self, values: Tensor, gradients: Tensor, losses: Tensor) -> list[bool]:
        """Move the lanes whose loss and gradient are finite, and return which those are; uses the gradients up."""
        norms = self._norms(gradients)
        sound = (torch.isfinite(norms) & torch.isfinite(losses)).tolist()
        if self._local.max_grad_norm is not None:
            # As torch.nn.utils.clip_grad_norm_ has it, lane by lane.
            shrink = self._local.max_grad_norm / (norms + 1e-6)
            gradients.mul_(shrink.clamp(max=1.0).unsqueeze(1))
        self._counts = [n + good for n, good in zip(self._counts, sound, strict=True)]
        state = [values, gradients, *self._moments, *self._decaying]
        kinds = list(zip(self._counts, self._factors, strict=True))
        for kind in sorted({kind for kind, good in zip(kinds, sound, strict=True) if good}):
            lanes = [i for i, other in enumerate(kinds) if other == kind and sound[i]]
            if len(lanes) == len(sound):
                self._move_(*kind, state)
                continue
            # Bias corrections differ by the steps behind a lane, and rates may, so equals move together.
            index = torch.tensor(lanes, device=values.device)
            part = [t[index] for t in state]
            self._move_(*kind, part)
            for whole, moved in zip(state, part, strict=True):
                whole[index] = moved
        return sound

    def _move_(self, count: int, factors: Factors, state: Sequence[Tensor]) -> None:
        values, gradients = state[:2]
        parts = state[2 : 2 + len(self._moments)]
        each = len(parts) // max(len(self._held), 1)
        where = state[2 + len(self._moments)] if self._decaying else None
        size = values.shape[1]
        window = (self._held[0].window if self._held else None) or max(size, 1)
        for first in range(0, size, window):
            some = slice(first, first + window)
            own = values[:, some]
            moments = [
                one.read(parts[at * each :], own, first) for at, one in enumerate(self._held)
            ]
            decays = None if where is None else where[:, some]
            self._step_(count, factors, own, gradients[:, some], moments, decays)
            for at, one in enumerate(self._held):
                one.write_(parts[at * each :], moments[at], first, count)

    def _step_(
        self,
        count: int,
        factors: Factors,
        values: Tensor,
        gradients: Tensor,
        moments: Sequence[Tensor],
        where: Tensor | None,
    ) -> None:
        lr, rate = self._lr * factors[0], self._local.weight_decay * factors[1]
        if self._local.optimizer == "adamw":
            if rate:
                values.mul_(1 - lr * rate if where is None else 1 - lr * rate * where)
            self._adam_(count, lr, values, gradients, moments)
            return
        if rate:
            gradients.add_(values if where is None else values * where, alpha=rate)
        if moments:
            gradients = moments[0].mul_(self._local.momentum).add_(gradients)
        values.add_(gradients, alpha=-lr)

    def _adam_(
        self, count: int, lr: float, values: Tensor, gradients: Tensor, moments: Sequence[Tensor]
    ) -> None:
        first, second = self._local.betas
        mean, square = moments
        mean.lerp_(gradients, 1 - first)
        square.mul_(second).addcmul_(gradients, gradients, value=1 - second)
        root = (square.sqrt() / (1 - second**count) ** 0.5).add_(1e-8)
        values.addcdiv_(mean, root, value=-lr / (1 - first**count))

    def keep(self, lanes: Tensor) -> None:
        self._moments = [t[lanes] for t in self._moments]
        self._decaying = [t[lanes] for t in self._decaying]
        self._counts = [self._counts[lane] for lane in lanes.tolist()]
        self._factors = [self._factors[lane] for lane in lanes.tolist()]
