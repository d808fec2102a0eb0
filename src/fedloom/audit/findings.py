"""What an attack found: one number, of what it is, what chance would give, and a sentence."""

from dataclasses import dataclass

from fedloom.core.protocols import ClientId


@dataclass(frozen=True, slots=True)
class Finding:
    """One measured number of one attack."""

    attack: str
    """The attack's name."""
    space: str
    """What is tuned, as in `lora, rank 8`."""
    link: str
    """What travels, as in `fedavg, float32` or `flasc(fedavg), int8, secure sum`."""
    seen: str
    """What the attack was given, as in `upload`, `sum of 4` or `model`."""
    measure: str
    """What the number is, as in `AUC of residuals`."""
    value: float
    chance: float
    """What the number would be if nothing were revealed."""
    says: str
    """The finding in one sentence."""
    client: ClientId | None = None
    """Whose data it is about; None: everybody's that was asked."""
    round: int | None = None
    """Of the run; None: all of them."""
    interval: tuple[float, float] | None = None
    """Of 95 % confidence; None where the number is a count of what lies there, and no estimate."""
