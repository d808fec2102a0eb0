"""What stands in for a model that clients may not have, and who moves it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from fedloom.core.protocols import Params

Match = Literal["l2", "cosine", "layers"]
"""How states of the emulator and of what it stands in for are compared."""


@dataclass(frozen=True, slots=True)
class EmulatorShape:
    """Which of the tuned tensors are the emulator's."""

    left: int
    """First layers that learn."""
    right: int
    """Last layers that learn; those between the two are the emulator's."""
    factors: int
    """Rank of the emulator's own factors; 0 where nothing of it moves."""


@runtime_checkable
class HasEmulator(Protocol):
    """What is tuned, where clients have a part of the model and an emulator of the rest."""

    @property
    def emulator(self) -> EmulatorShape:
        """Return which tensors are whose."""
        ...


@dataclass(frozen=True, slots=True)
class Distance:
    """How far an emulator is from what it stands in for, around the same layers that learn."""

    match: Match
    """What is compared of the states behind the middle: their squared distance over the whole model's mean square, or
    their angle; or the first at every layer of the middle that is kept."""
    hidden: float
    """Weight of that."""
    kd: float
    """Weight of the KL divergence of the emulator's next tokens from the whole model's, a mean over tokens asked for."""
    temperature: float
    """That both are softened by."""


@runtime_checkable
class Aligns(Protocol):
    """An algorithm whose state holds the emulator, which the server moves towards what it stands in for."""

    @property
    def before(self) -> int:
        """Return the steps before round 1."""
        ...

    @property
    def steps(self) -> int:
        """Return the steps after every round."""
        ...

    @property
    def batch_size(self) -> int:
        """Return the public rows of a step."""
        ...

    @property
    def distance(self) -> Distance:
        """Return what a step lessens."""
        ...

    @property
    def text(self) -> Mapping[str, Any]:
        """Return what of section `data` is the server's own: where its public rows are."""
        ...

    def factors(self, state: Any) -> Params:
        """Return where the emulator's factors stand."""
        ...

    def moved(self, state: Any, gradient: Params) -> Any:
        """Return the state after a step against the gradient of the distance by the emulator's factors; a pure function."""
        ...
