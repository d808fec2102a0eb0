"""Text of the server's own, which belongs to no client."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PublicText:
    """Rows that the server reads, as `data` reads the clients': the same prompt and length, in the place of its source."""

    source: str
    """As `data.source`: a file or folder, a Hub id, or a built-in corpus."""
    config: str | None = None
    """Configuration of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set."""
    revision: str | None = None
    """Commit, tag or branch of a Hub data set."""
    num_examples: int | None = None
    """How many rows to write (built-in), or to take at most."""
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Keep rows whose column has one of these values."""
    format: str = "auto"
    """How a row becomes a conversation."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The name a format knows -> the name in the file."""
    seed: int = 0
    """Of the rows that are written or taken."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("fedbiot.public.source must name text of the server's own, got ''")
