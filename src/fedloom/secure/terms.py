"""What one attempt at a sum is about, and the words that its keys, signatures and masks are bound to."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.secure.settings import SecureSettings

_LABEL = "fedloom secure sum 1"


@dataclass(frozen=True, slots=True)
class Terms:
    """One attempt: all who take part know the same of it, or their masks do not cancel."""

    run: str
    """The hash of the recipe that all agreed on."""
    round: int
    """From 1."""
    attempt: str
    """(32 hexadecimal digits) drawn anew by the server for every attempt, of which a round may need several."""
    task: str
    """The hash of the download that all of them train from."""
    heaviest: float
    """What no client weighs more than."""

    def told(self) -> dict[str, Any]:
        """Return what the server says of it."""
        return {
            "round": self.round,
            "attempt": self.attempt,
            "task": self.task,
            "heaviest": self.heaviest,
        }

    def words(self, kind: str, settings: SecureSettings, said: Sequence[Any]) -> bytes:
        """Return what is signed or hashed: of one kind, about this attempt, under these settings."""
        own = [self.run, self.round, self.attempt, self.task, self.heaviest]
        terms = [settings.threshold, settings.neighbours, settings.bits, settings.clip]
        return json.dumps([_LABEL, kind, *own, *terms, list(said)]).encode()


def hash_of(task_body: bytes | memoryview) -> str:
    """Return the hash of an encoded download."""
    return hashlib.sha256(task_body).hexdigest()


@dataclass(frozen=True, slots=True)
class Advert:
    """The public keys of one client for one attempt, signed by the key that it joined with."""

    cipher: bytes
    """(32,) what shares are sealed by."""
    mask: bytes
    """(32,) what masks come from."""
    commitment: bytes
    """(32,) the hash of its own mask's seed: a sum of wrong shares is found out."""
    signature: bytes
    """Of all that, by the site's key."""

    def said(self, name: str) -> list[str]:
        """Return what is signed, beside the attempt."""
        return [name, self.cipher.hex(), self.mask.hex(), self.commitment.hex()]

    def pieces(self) -> bytes:
        """Return it as bytes."""
        return self.cipher + self.mask + self.commitment + self.signature

    @classmethod
    def read(cls, data: bytes) -> "Advert":
        """Return what `pieces` wrote.

        Raises:
            ValueError: where it is too short or too long to be one.
        """
        if not 96 < len(data) <= 96 + 160:
            raise ValueError(f"an advert must have up to 256 bytes, got {len(data)}")
        return cls(data[:32], data[32:64], data[64:96], data[96:])


def context_of(terms: Terms, settings: SecureSettings, adverts: Mapping[str, Advert]) -> bytes:
    """Return the hash of an attempt with all who take part: the salt of every key."""
    said = [advert.said(name) for name, advert in sorted(adverts.items())]
    return hashlib.sha256(terms.words("everybody", settings, said)).digest()
