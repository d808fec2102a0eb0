"""What reaches a site in frames: large messages, and before round 1 the files of a model that it may not have whole.

The server's envelopes list them with their lengths and hashes. A site asks for what it lacks, from the frame at which it was
cut off; nothing is read before it is whole. What it answers with waits in a file until the server has fetched it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.engines.parcels import Listing, Parcel, Piece, Spool, add, listings, mapped, missing

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.(safetensors|json|jinja|txt|model)")
"""Weights without code, and texts."""


def handed_over(folder: Path) -> dict[str, Parcel]:
    """Return the files that the server hands to each site, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: Parcel(path) for path in files}


@dataclass
class Handover:
    """A site's end."""

    files: Path
    """Where a model's files come."""
    messages: Path
    """Where messages lie."""
    spool: Spool = field(init=False)

    def __post_init__(self) -> None:
        """Let messages that wait to be fetched lie beside those that come."""
        self.spool = Spool(self.messages)

    @staticmethod
    def num_bytes(header: Mapping[str, Any], pieces: Sequence[Piece]) -> int:
        """Return the length of a message, with all that it announces."""
        announced = listings(header.get("parcels", {})).values()
        return sum(map(len, pieces)) + sum(listing.size for listing in announced)

    def take(self, header: Mapping[str, Any], pieces: Sequence[Piece]) -> list[Piece]:
        """Write the frames that an envelope brings; return the pieces that are its own.

        Raises:
            ValueError: where they are not what was asked for.
        """
        brought = header.get("frames")
        if brought is None:
            return list(pieces)
        own = len(pieces) - brought["number"]
        for of, name, file, listing in self._listed(header):
            if (of, name) == (brought["of"], brought["name"]):
                add(file, listing, brought["at"], pieces[own:])
        return list(pieces[:own])

    def lacking(self, header: Mapping[str, Any], of: str) -> dict[str, Any] | None:
        """Return what is asked for next; None where all is here.

        Raises:
            ValueError: where files are listed that no site takes.
        """
        for field_, name, file, listing in self._listed(header):
            if field_ == of and (at := missing(file, listing)) is not None:
                return {"of": of, "name": name, "at": at}
        return None

    def whole(self, header: Mapping[str, Any], pieces: Sequence[Piece]) -> list[Piece]:
        """Return an envelope's pieces, its parcels among them; those of earlier ones are removed."""
        found = list(pieces)
        kept = [listing.key for _, _, _, listing in self._listed(header)]
        self.spool.clear(but=kept)
        for of, name, file, _ in self._listed(header):
            if of == "parcels":
                found[int(name)] = mapped(file)
        return found

    def left(self, pieces: Sequence[Piece]) -> tuple[dict[str, Any], list[Piece]]:
        """Return what is said of an answer's parcels, and the pieces that go with it at once."""
        own, parcels = self.spool.parted(pieces)
        listed = {name: parcel.listing.plain() for name, parcel in parcels.items()}
        return {"parcels": listed} if listed else {}, own

    def fetched(self, asked: Mapping[str, Any]) -> list[memoryview]:
        """Return the frames of an answer that the server asks for.

        Raises:
            ValueError: where there are none.
        """
        return self.spool.find(asked["name"]).frames(asked["at"])

    def _listed(self, header: Mapping[str, Any]) -> Iterator[tuple[str, str, Path, Listing]]:
        for name, listing in listings(header.get("files", {})).items():
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"this site takes weights as safetensors and texts, no file called {name[:60]!a}"
                )
            yield "files", name, self.files / name, listing
        for name, listing in listings(header.get("parcels", {})).items():
            yield "parcels", name, self.messages / listing.key, listing
