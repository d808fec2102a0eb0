"""What sites say that their work took."""

from fedloom.core.protocols import Spent
from fedloom.engines.requests import Envelope

_LONGEST = 1e9
"""Seconds, and steps, that are believed at most."""


def spent_of(answer: Envelope | str, number: int) -> list[Spent]:
    """Return what each of so many tasks took, as its site says; nothing where it says nothing that can be."""
    told = None if isinstance(answer, str) else answer.header.get("spent")
    if not isinstance(told, list) or len(told) != number:
        return [Spent()] * number
    return [_believed(one) for one in told]


def _believed(told: object) -> Spent:
    match told:
        case [float() | int() as seconds, int() as steps] if (
            0 <= seconds <= _LONGEST and 0 <= steps <= _LONGEST
        ):
            return Spent(float(seconds), steps)
    return Spent()
