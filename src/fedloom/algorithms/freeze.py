"""Freeze some of the tuned tensors in any algorithm; FFA-LoRA with `names: [lora_A]`.

Improving LoRA in Privacy-preserving Federated Learning. Sun, Li, Li, Ding, ICLR 2024
(arXiv:2403.12313), section 4: A stays as it was drawn, B is trained and sent, so that the mean of
the products is the product of the means.

The inner algorithm lives in the space of the moving names: they alone are in its state, its client_state
and its uploads. On a client its work is extended by the frozen names, masked. A download holds
them too, but with `tune.lora.origin: initial` they are zeros, which the wire leaves out; with `zero`
they are sent every time, and the model is the same.

Deviations: the names are the recipe's, in any space; the paper's private noise is no part of it.
Around `ditto` personal models are frozen too; inside it they are not.
"""

from dataclasses import dataclass

from fedloom.core.protocols import Algorithm, Params, State
from fedloom.core.split import Frozen, SplitState


@dataclass(frozen=True, slots=True)
class Freeze(Frozen[State]):
    """Trains and sends the tensors whose names hold none of `names`."""

    inner: Algorithm[State]
    """Trains the others."""
    names: tuple[str, ...] = ("lora_A",)
    """Parts of the names of frozen tensors."""

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise ValueError(f"freeze.names must be parts of names, none empty, got {self.names!r}")

    def init(self, params: Params, seed: int) -> SplitState[State]:
        for part in self.names:
            if not any(part in name for name in params):
                raise ValueError(
                    f"freeze.names must be parts of tuned tensors' names,"
                    f" such as {next(iter(params))}, got {part!r}"
                )
        moving, frozen = self.split(params)
        if not moving:
            raise ValueError(f"freeze.names must leave a tensor to train, got {list(self.names)!r}")
        return SplitState(self.inner.init(moving, seed), frozen)

    def split(self, params: Params) -> tuple[Params, Params]:
        """Return the moving and the frozen tensors."""
        frozen = {n: t for n, t in params.items() if any(part in n for part in self.names)}
        return {n: t for n, t in params.items() if n not in frozen}, frozen
