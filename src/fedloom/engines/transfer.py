"""An envelope to one site and its answer, however large: parcels go and come frame by frame in envelopes of their own.

A site answers with what it asks for until it lacks nothing, and then with its answer; what of that is a parcel is fetched.
Every envelope says all that is needed to go on, so that one that was lost is sent again, and nothing but that one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedloom.engines.parcels import Listing, Parcel, Piece, add, listings, mapped, missing
from fedloom.engines.requests import Envelope, Next


@dataclass
class Transfer:
    """What is said to one site, step by step."""

    envelope: Envelope
    parcels: Mapping[str, Mapping[str, Parcel]]
    """By the field of the header that lists them, and by name."""
    folder: Path
    """Where this site's parcels are put together."""
    most_bytes: Callable[[], int] = lambda: 0
    """Of all parcels of an answer: a site that announces more is not heard, so that none can fill the disk."""
    _answer: Envelope | None = None
    _due: Mapping[str, Listing] = field(default_factory=dict)

    def opening(self) -> Envelope:
        """Return the first envelope."""
        listed = {
            of: {name: parcel.listing.plain() for name, parcel in parcels.items()}
            for of, parcels in self.parcels.items()
            if parcels
        }
        self.envelope = replace(self.envelope, header={**self.envelope.header, **listed})
        return self.envelope

    def then(self, answer: Envelope) -> Envelope | Next | str:
        """Return what is sent next, or the whole answer, or why there will be none."""
        try:
            if self._answer is not None:
                return self._fetched(answer)
            if "asks" in answer.header:
                return self._asked(answer.header["asks"])
            if "parcels" not in answer.header:
                return answer
            self._due = self._announced(answer)
            self._answer = answer
            return self._next()
        except ValueError as error:
            return str(error)

    def _asked(self, asked: object) -> Next:
        match asked:
            case {"of": str(of), "name": str(name), "at": at} if name in self.parcels.get(of, {}):
                frames = self.parcels[of][name].frames(at)
                said = {"of": of, "name": name, "at": at, "number": len(frames)}
                header = {**self.envelope.header, "frames": said}
                return Next(Envelope(header, [*self.envelope.pieces, *frames]))
        raise ValueError("it asks for what is not handed over: install the same fedloom")

    def _announced(self, answer: Envelope) -> Mapping[str, Listing]:
        due = listings(answer.header["parcels"])
        gaps = {str(at) for at, piece in enumerate(answer.pieces) if not piece}
        if not due.keys() <= gaps:
            raise ValueError("it announces parcels for which its answer has no place")
        size = sum(listing.size for listing in due.values())
        if size > (most := self.most_bytes()):
            raise ValueError(f"it announces {size} bytes, replies to its tasks have at most {most}")
        return due

    def _fetched(self, answer: Envelope) -> Envelope | Next | str:
        if "refusal" in answer.header:
            return str(answer.header["refusal"])
        listing, at = self._missing()
        add(self.folder / listing.key, listing, at, answer.pieces)
        return self._next()

    def _next(self) -> Envelope | Next:
        if self._all_here():
            return self._whole()
        listing, at = self._missing()
        site = self.envelope.header.get("site")
        asks = {"name": listing.key, "at": at}
        return Next(Envelope({"kind": "fetch", "site": site, "asks": asks}))

    def _all_here(self) -> bool:
        return all(missing(self.folder / one.key, one) is None for one in self._due.values())

    def _missing(self) -> tuple[Listing, int]:
        found = ((one, missing(self.folder / one.key, one)) for one in self._due.values())
        return next((one, at) for one, at in found if at is not None)

    def _whole(self) -> Envelope:
        assert self._answer is not None
        pieces: list[Piece] = list(self._answer.pieces)
        for at, listing in self._due.items():
            pieces[int(at)] = mapped(self.folder / listing.key)
        header = {k: v for k, v in self._answer.header.items() if k != "parcels"}
        return Envelope(header, pieces)
