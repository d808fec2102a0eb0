"""Bytes that are too many for one message: files in frames with a hash each, sent a few frames at a time.

Whoever has a parcel lists its frames. Whoever wants it asks for what is missing, and writes what has the right hash behind
what is there: where a link was lost it goes on from the last whole frame. Neither side holds a parcel in memory, both map
its file.
"""

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.core.files import PART

Piece = bytes | memoryview

FRAME = 16 << 20
"""Bytes of a frame."""
AT_ONCE = 4
"""Frames of one message; what fits into one message with all else travels in no frames."""
SMALL = 1 << 20
"""Bytes that go with their envelope, however large that is."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What is said of a parcel before any of it is sent."""

    size: int
    hashes: tuple[str, ...]
    """The SHA-256 of every frame."""

    @classmethod
    def read(cls, value: object) -> "Listing":
        """Return what `plain` returned on the other side.

        Raises:
            ValueError: where it is nothing of the kind.
        """
        match value:
            case [int(size), list(hashes)] if (
                type(size) is int
                and size >= 0
                and len(hashes) == -(-size // FRAME)
                and all(isinstance(one, str) and len(one) == 64 for one in hashes)
            ):
                return cls(size, tuple(hashes))
        raise ValueError("a parcel's listing is malformed: install the same fedloom")

    def plain(self) -> list[Any]:
        """Return it as plain values."""
        return [self.size, list(self.hashes)]

    @property
    def key(self) -> str:
        """Return a name that no other content has."""
        return hashlib.sha256(json.dumps(self.plain()).encode()).hexdigest()


class Parcel:
    """A file that is mapped: its pages are the disk's, and free to go."""

    def __init__(self, file: Path) -> None:
        self.view = mapped(file)
        starts = range(0, len(self.view), FRAME)
        # Made once: a frame that goes to several sites is one object.
        self._frames = [self.view[at : at + FRAME] for at in starts]
        self.listing = Listing(len(self.view), tuple(map(_sha256, self._frames)))

    def frames(self, at: object) -> list[memoryview]:
        """Return the next few frames.

        Raises:
            ValueError: where no frame begins there.
        """
        if type(at) is not int or at % FRAME or not 0 <= at <= len(self.view):
            raise ValueError("no frame begins where it asks for one: install the same fedloom")
        return self._frames[at // FRAME :][:AT_ONCE]


@dataclass
class Spool:
    """A folder for messages that wait to be sent, each a file."""

    folder: Path
    _waiting: dict[int, Parcel] = field(default_factory=dict)

    def joined(self, pieces: Sequence[Piece]) -> Piece:
        """Return the pieces as one; where that is more than a frame, in a file, so that no second copy is in memory."""
        return b"".join(pieces) if sum(map(len, pieces)) <= FRAME else self._stored(pieces).view

    def parted(self, pieces: Sequence[Piece]) -> tuple[list[Piece], dict[str, Parcel]]:
        """Return what goes along in an envelope, with gaps, and by their places the parcels that belong there."""
        if sum(map(len, pieces)) <= AT_ONCE * FRAME:
            return list(pieces), {}
        parcels = {}
        for at, piece in enumerate(pieces):
            if len(piece) > min(SMALL, FRAME):
                parcels[str(at)] = self._waiting.get(id(piece)) or self._stored([piece])
        return [b"" if str(at) in parcels else piece for at, piece in enumerate(pieces)], parcels

    def find(self, key: object) -> Parcel:
        """Return the parcel of a key, which may have been spooled before this process began.

        Raises:
            ValueError: where there is none.
        """
        for parcel in self._waiting.values():
            if parcel.listing.key == key:
                return parcel
        if key in {path.name for path in self.folder.glob("*") if path.suffix != PART}:
            parcel = Parcel(self.folder / str(key))
            self._waiting[id(parcel.view)] = parcel
            return parcel
        raise ValueError("what is asked for is not here any more")

    def clear(self, *, but: Sequence[str] = ()) -> None:
        """Remove all files but those of these keys, whole or begun; who has one mapped keeps its content."""
        self._waiting.clear()
        for path in self.folder.glob("*"):
            if path.name.removesuffix(PART) not in but:
                path.unlink()

    def _stored(self, pieces: Sequence[Piece]) -> Parcel:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = self.folder / f"message{PART}"
        with open(part, "wb") as file:
            for piece in pieces:
                file.write(piece)
        parcel = Parcel(part)
        part.replace(self.folder / parcel.listing.key)
        self._waiting[id(parcel.view)] = parcel
        return parcel


def missing(file: Path, listing: Listing) -> int | None:
    """Return from which byte on a file is missing; None where it is whole."""
    is_as_long = file.is_file() and file.stat().st_size == listing.size
    # A file with its key for a name was checked frame by frame.
    if is_as_long and (file.name == listing.key or Parcel(file).listing == listing):
        return None
    part = _part(file, listing)
    begun = part.stat().st_size if part.is_file() else 0
    return min(begun, listing.size) // FRAME * FRAME


def add(file: Path, listing: Listing, at: int, frames: Sequence[Piece]) -> None:
    """Write frames behind what is there of a file; once it is whole it has its name.

    Frames that are there already change nothing: an envelope whose answer was lost comes again.

    Raises:
        ValueError: where they are not what was sent, or leave a gap.
    """
    for number, frame in enumerate(frames, start=at // FRAME):
        expected = min(FRAME, listing.size - number * FRAME)
        if expected <= 0 or len(frame) != expected or _sha256(frame) != listing.hashes[number]:
            raise ValueError(f"frame {number} of {file.name} did not arrive as it was sent")
    begun = missing(file, listing)
    if begun is None:
        return
    if at > begun or not (frames or begun == listing.size):
        raise ValueError(f"{file.name} came in frames that are not the next ones")
    frames = frames[(begun - at) // FRAME :]
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = _part(file, listing)
    with open(part, "r+b" if part.exists() else "wb") as opened:
        opened.truncate(begun)
        opened.seek(begun)
        for frame in frames:
            opened.write(frame)
    if begun + sum(map(len, frames)) == listing.size:
        part.replace(file)


def mapped(file: Path) -> memoryview:
    """Return a file's bytes without reading them."""
    with open(file, "rb") as opened:
        if not file.stat().st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ))


def listings(value: object) -> Mapping[str, Listing]:
    """Return what is listed by name.

    Raises:
        ValueError: where that is malformed.
    """
    if not isinstance(value, dict):
        raise ValueError("a list of parcels is malformed: install the same fedloom")
    return {str(name): Listing.read(one) for name, one in value.items()}


def _part(file: Path, listing: Listing) -> Path:
    # Bound to what is to come: the beginning of another file of this name is no beginning of this one.
    name = file.name if file.name == listing.key else f"{file.name}.{listing.key[:16]}"
    return file.with_name(f"{name}{PART}")


def _sha256(data: Piece) -> str:
    return hashlib.sha256(data).hexdigest()
