"""What a federation holds, without its text: for the run directory, the report and the preview."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedloom.core.protocols import ClientId, Profile
from fedloom.data.duplicates import Duplicates, Leak
from fedloom.data.exclusion import Excluded, listed
from fedloom.data.labels import HiddenLabel, shown_labels
from fedloom.data.losses import Losses
from fedloom.data.sharding import UNKNOWN


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
    """Label -> value -> number of examples of all three splits; of labels that are not hidden."""
    num_values: Mapping[str, int] = field(default_factory=dict)
    """Hidden label -> how many values of it this client has."""


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
    num_dropped: int
    """Examples whose answer did not fit `max_length`, left out."""
    num_truncated: int
    """Examples that lost a part of their prompt or answer, kept."""
    num_unassigned: int
    """Examples of natural clients beyond the `largest`, left out."""
    clients: Mapping[ClientId, ClientCounts]
    not_taken: Mapping[str, int] = field(default_factory=dict)
    """Rows left out before anything else, by the settings that say so."""
    num_unlabelled: int = 0
    """Rows without a value of the label `by`: they have the value unknown."""
    num_untested: int = 0
    """Clients that learn and have too few examples for a test split."""
    duplicates: Duplicates = field(default_factory=Duplicates)
    hidden: Mapping[str, HiddenLabel] = field(default_factory=dict)
    """Labels whose values are not told."""
    notes: Sequence[str] = ()
    """What was done to the text on the way to tokens."""
    profiles: Mapping[ClientId, Profile] = field(default_factory=dict)
    """What both sides know of each client: with it a run is read where its data is not."""
    losses: Losses = field(default_factory=Losses)
    """How rows were read, and what of them is in no example."""
    files_unread: Sequence[str] = ()
    """What is in the folder and is not read."""
    prompt: str = ""
    """The prompt that conversations are written in, in words: what `data.prompt` came to."""
    excluded: Excluded = field(default_factory=Excluded)
    """Clients left out with too few training examples."""
    unseen: Sequence[ClientId] = ()
    """Clients that never train and are measured apart."""

    @property
    def num_empty(self) -> int:
        """Return the rows without an answer, left out."""
        return self.losses.num_empty

    def left_out(self) -> list[str]:
        """Return a line for each kind of loss or change between the rows read and what is learnt, as all commands say it."""
        natural = self.partition == "natural"
        counts = (
            *((count, f"rows left out by {names}") for names, count in self.not_taken.items()),
            (
                self.num_dropped,
                f"examples left out: the answer does not fit in {self.max_length}",
            ),
            (self.num_truncated, f"examples cut to {self.max_length} tokens, kept"),
            (
                self.num_unassigned,
                "examples of natural clients beyond data.partition.natural.largest, left out",
            ),
            (
                self.num_unlabelled,
                f"rows whose {self.by} is missing, or {UNKNOWN}, kept as "
                + ("a client called so" if natural else "a value of its own"),
            ),
            (
                self.num_untested,
                "clients with too few examples for a test split, learnt from and not measured",
            ),
        )
        hidden = [
            f"values of {name} are not shown: {label.num_values:,} different ones, too many or too long for a label"
            for name, label in self.hidden.items()
        ]
        lines = [f"{count:,} {what}" for count, what in counts if count]
        files = [f"files not read: {', '.join(self.files_unread)}"] if self.files_unread else []
        return [
            *self.losses.lines(),
            *lines,
            *files,
            *self.excluded.lines(),
            *(
                [f"{len(self.unseen):,} clients never train: {listed(self.unseen)}"]
                if self.unseen
                else []
            ),
            *self.notes,
            *self.duplicates.lines(),
            *hidden,
        ]

    def shown_labels(self, labels: Mapping[str, str]) -> dict[str, str]:
        """Return the labels of an example, or a client's profile, as they may be written down or sent.

        A hidden value gives a hash, so that equal ones stay equal; `group` is made of values of the label `by`.
        """
        group = {"group"} if self.by in self.hidden else set()
        # Not a label, even where a column is called so.
        return shown_labels(labels, (self.hidden.keys() | group) - {"num_examples"})

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Manifest":
        """Return the manifest that `to_json` wrote."""
        repeated = dict(data.get("duplicates", {}))
        repeated["leaks"] = {k: Leak(**leak) for k, leak in repeated.get("leaks", {}).items()}
        excluded = dict(data.get("excluded", {}))
        excluded["judges"] = tuple(excluded.get("judges", ()))
        given = {
            "clients": {name: ClientCounts(**counts) for name, counts in data["clients"].items()},
            "duplicates": Duplicates(**repeated),
            "excluded": Excluded(**excluded),
            "losses": Losses(**data.get("losses", {})),
            "files_unread": tuple(data.get("files_unread", ())),
            "notes": tuple(data.get("notes", ())),
            "unseen": tuple(data.get("unseen", ())),
            "hidden": {
                name: HiddenLabel(**label) for name, label in data.get("hidden", {}).items()
            },
        }
        return cls(**{**data, **given})
