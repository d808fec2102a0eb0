"""What the server received, kept for an audit: `audit: record` in a recipe, of clients on this machine alone.

Every upload of a round's training as the server reads it, after the wire's rounding, and after the sum where uploads are
added up before anybody reads one. It is written in the wire's own format, with the task that it answers in the header; what
the clients were sent lies beside it, as they read it. In rounds in which nobody waits an upload lies in the step before
which its client began.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.core.files import write_atomic
from fedloom.core.protocols import (
    ClientFailure,
    ClientId,
    Delivery,
    Engine,
    Payload,
    Profile,
    Reply,
    Task,
)
from fedloom.rounds.recipe_settings import Recipe
from fedloom.wire.format import WireError, decode_with_header, encode
from fedloom.wire.wire_settings import WireSettings

FOLDER = "received"
NOTE = (
    "What the server received is kept in received/ (audit: record): clients' uploads, from which parts of their data can be"
    " told. It is for an audit of a simulation, and no folder to hand on."
)
"""What a run and its report say where uploads are kept."""


@dataclass(frozen=True)
class Received:
    """One upload as the server read it: of one client, or the sum of several."""

    round: int
    clients: Sequence[ClientId]
    """Whose it is; of a sum, all that are in it."""
    seeds: Sequence[int]
    """Of their tasks."""
    weight: float
    """In the mean; of a sum, that of all of them."""
    upload: Payload
    """After the wire: of a sum, the weighted mean of theirs."""
    download: Payload
    """What they were sent, as they read it."""
    num_bytes: int
    """Of the message, or of all messages of the sum."""


@dataclass
class Recorded:
    """An engine whose uploads in one round are kept as they go by; what an earlier try at the round left is removed."""

    engine: Engine
    folder: Path
    """Of the run."""
    number: int
    """The round's."""
    wire: WireSettings
    _count: int = 0
    _sent: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shutil.rmtree(self._home, ignore_errors=True)

    @property
    def _home(self) -> Path:
        return _round_folder(self.folder, self.number)

    def population(self) -> Mapping[ClientId, Profile]:
        """Return the engine's own."""
        return self.engine.population()

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Yield the engine's deliveries; keep those that answer a task to train."""
        lost = set[ClientId]()
        self._sent.clear()
        for delivery in self.engine.run(tasks):
            answer = delivery.answer
            if isinstance(answer, ClientFailure):
                lost.add(answer.client)
            elif tasks[0].kind == "train":
                self._keep(answer, self._answered(tasks, answer, lost), delivery.upload_bytes)
            yield delivery

    def _answered(self, tasks: Sequence[Task], reply: Reply, lost: set[ClientId]) -> list[Task]:
        """Return the tasks that a reply answers: one, or those that were added up with it, see `engines.sums.sums_of`."""
        (own,) = (task for task in tasks if task.client == reply.client)
        if reply.count == 1:
            return [own]

        def key(task: Task) -> tuple[str, str]:
            return self._name(task.download), task.group

        found = [task for task in tasks if task.client not in lost and key(task) == key(own)]
        assert len(found) == reply.count, "a sum is of those who trained from one download"
        return found

    def _keep(self, reply: Reply, answered: Sequence[Task], num_bytes: int) -> None:
        header = {
            "round": self.number,
            "clients": [task.client for task in answered],
            "seeds": [str(task.seed) for task in answered],  # wider than a number of JSON
            "weight": reply.weight,
            "num_bytes": num_bytes,
            "download": self._name(answered[0].download),
        }
        self._count += 1
        self._write(f"upload-{self._count:05}.bin", encode(reply.upload, header))

    def _name(self, download: Payload) -> str:
        """Return the file in which a download is kept, the same for all that read alike."""
        if id(download) not in self._sent:
            message = encode(download, values=self.wire.download, compression=self.wire.compression)
            name = f"download-{hashlib.sha256(message).hexdigest()[:16]}.bin"
            self._write(name, message)
            self._sent[id(download)] = name
        return self._sent[id(download)]

    def _write(self, name: str, message: bytes) -> None:
        write_atomic(self._home / name, message, private=self.folder / FOLDER, sync=False)


def keeping(engine: Engine, recipe: Recipe, folder: Path, number: int) -> Engine:
    """Return the engine of a round, which keeps what the server receives where the recipe says so."""
    if recipe.audit == "off":
        return engine
    return Recorded(engine, folder, number, recipe.wire)


def recorded_rounds(folder: Path) -> list[int]:
    """Return the rounds of a run of which something was kept, in order."""
    found = (folder / FOLDER).glob("round-*")
    return sorted(int(one.name.removeprefix("round-")) for one in found if any(one.iterdir()))


def read_round(folder: Path, number: int) -> Iterator[Received]:
    """Yield what the server received in a round, in the order in which it did.

    Raises:
        ValueError: where a file is not as it was written.
    """
    downloads: dict[str, Payload] = {}
    for file in sorted(_round_folder(folder, number).glob("upload-*.bin")):
        try:
            header, upload = decode_with_header(file.read_bytes(), max_bytes=None)
            name = Path(header["download"]).name
            if name not in downloads:
                sent = (file.parent / name).read_bytes()
                downloads[name] = decode_with_header(sent, max_bytes=None)[1]
            yield Received(
                header["round"],
                tuple(header["clients"]),
                tuple(map(int, header["seeds"])),
                header["weight"],
                upload,
                downloads[name],
                header["num_bytes"],
            )
        except (WireError, OSError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is no upload as a run keeps it ({error}): remove {file.parent}, and audit other rounds"
            ) from error


def _round_folder(folder: Path, number: int) -> Path:
    return folder / FOLDER / f"round-{number:05}"
