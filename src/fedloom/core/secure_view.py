"""What algorithms read of the recipe's section `secure`."""

from typing import Protocol


class SecureView(Protocol):
    """What our algorithms read of section `secure`."""

    @property
    def threshold(self) -> int:
        """Return the fewest clients of a sum."""
        ...

    @property
    def bits(self) -> int:
        """Return those of an entry."""
        ...

    @property
    def clip(self) -> float:
        """Return the largest entry."""
        ...
