"""The recipe section `secure`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SecureSettings:
    """Sums that nobody can open: the server learns what a cohort's uploads add up to, and no single one of them."""

    threshold: int
    """Fewest clients that a sum is of; a round with fewer changes nothing. More than half of the cohort hold out in any
    case, whatever this says."""
    neighbours: int | None = None
    """Clients each masks its upload with, an even number; None: all others. With fewer a round costs less, and fewer
    may drop out of it."""
    bits: int = 20
    """Of a coordinate's fixed point: a step is clip * 2^-bits, and a sum takes bits + 1 + log2(clients) bits."""
    clip: float = 1.0
    """Largest entry of an upload; a larger one is cut to it, at the client. server/secure_clipped counts them."""

    def __post_init__(self) -> None:
        """Refuse what no sum can be made with."""
        if self.threshold < 2:
            raise ValueError(
                f"secure.threshold must be at least 2, as a sum of one is its upload, got {self.threshold}"
            )
        if self.neighbours is not None and self.neighbours < 2:
            raise ValueError(f"secure.neighbours must be at least 2, got {self.neighbours}")
        if not 8 <= self.bits <= 28:
            raise ValueError(f"secure.bits must be from 8 to 28, got {self.bits}")
        if not 0 < self.clip < float("inf"):
            raise ValueError(f"secure.clip must be a positive number, got {self.clip}")
