"""What stands in for a model that clients may not have, and who moves it."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fedloom.core.protocols import Params


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


@runtime_checkable
class Aligns(Protocol):
    """An algorithm whose state holds the emulator, which the server moves towards what it stands in for."""

    def emulator(self, state: Any) -> Params:
        """Return where the emulator stands."""
        ...

    def moved(self, state: Any, gradient: Params) -> Any:
        """Return the state after a step against the gradient of the emulator's distance; a pure function."""
        ...
