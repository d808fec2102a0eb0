"""What `private.quiet` keeps out of a run's folder: all that no epsilon covers and that tells of single clients."""

from typing import Any, Protocol, runtime_checkable

from fedloom.core.protocols import Algorithm, Metrics
from fedloom.run.parts import parts_of


@runtime_checkable
class _Discreet(Protocol):
    @property
    def quiet(self) -> bool: ...


def is_quiet(algorithm: Algorithm[Any]) -> bool:
    """Return whether any layer of an algorithm asks for it."""
    return any(isinstance(part, _Discreet) and part.quiet for part in parts_of(algorithm))


def covered(metrics: Metrics) -> Metrics:
    """Return what follows from noisy means; evaluations, counts, bytes and times follow from who took part."""
    return {name: value for name, value in metrics.items() if name.startswith("server/")}
