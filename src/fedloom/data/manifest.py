"""What a federation holds, without its text: for the run directory, the report and the preview."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedloom.core.protocols import ClientId
from fedloom.data.losses import Losses


@dataclass(frozen=True, slots=True)
class ClientCounts:
    """What one client holds."""

    train: int
    """Examples, counted before packing."""
    validation: int
    test: int
    rows: int
    """Training sequences: fewer than `train` where they are packed."""
    tokens: int
    """Of the training split."""
    target_tokens: int
    """Of the training split: tokens with a loss."""
    labels: Mapping[str, Mapping[str, int]]
    """Label -> value -> number of examples of all three splits."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """How a data set was split."""

    sha256: str
    """Of the assignment: which conversation is in which split of which client."""
    source: str
    partition: str
    by: str | None
    """The label the partition goes by."""
    seed: int
    max_length: int
    num_rows: int
    """Rows read."""
    num_empty: int
    """Rows without an answer, left out."""
    num_dropped: int
    """Examples whose answer did not fit `max_length`, left out."""
    num_truncated: int
    """Examples that lost a part of their prompt or answer, kept."""
    num_unassigned: int
    """Examples of natural clients beyond `num_clients`, left out."""
    clients: Mapping[ClientId, ClientCounts]
    losses: Losses = field(default_factory=Losses)
    """How rows were read, and what of them is in no example."""
    files_unread: Sequence[str] = ()
    """What is in the folder and is not read."""

    def left_out(self) -> list[str]:
        """Return a line for each kind of loss between the rows read and what is learnt, as all commands say it."""
        counts = (
            (
                self.num_dropped,
                f"examples left out: no token of the answer fits in {self.max_length}",
            ),
            (self.num_truncated, f"examples cut to {self.max_length} tokens, kept"),
            (self.num_unassigned, "examples of natural clients beyond data.num_clients, left out"),
        )
        told = [f"{count:,} {what}" for count, what in counts if count]
        files = [f"files not read: {', '.join(self.files_unread)}"] if self.files_unread else []
        return [*self.losses.told(), *told, *files]

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Manifest":
        """Return the manifest that `to_json` wrote."""
        clients = {name: ClientCounts(**counts) for name, counts in data["clients"].items()}
        return cls(**{**data, "clients": clients, "losses": Losses(**data.get("losses", {}))})
