"""The server's side of one attempt at a secure sum: it passes on what clients say to each other, and opens the sum."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from fedloom.core.protocols import ClientId
from fedloom.secure import graph
from fedloom.secure.ciphers import Directory, agreed, derived, fresh_key, key_of, mask
from fedloom.secure.client import BOX_BYTES, consent_words, pair_key
from fedloom.secure.fixed_point import Words, unpacked, width
from fedloom.secure.messages import Step, message, names_in, only_part, read
from fedloom.secure.settings import SecureSettings
from fedloom.secure.shamir import combine, element
from fedloom.secure.terms import Advert, Terms, context_of

Exchange = Callable[[Step, Mapping[ClientId, bytes]], Mapping[ClientId, bytes | memoryview | str]]
"""Brings a message to each, and returns the answers, or the reason why there is none."""
T = TypeVar("T")


class NotOpened(ValueError):
    """A sum that stays closed, as too few hold together; nothing is known of its uploads."""


@dataclass
class SumServer:
    """One attempt, from the first message to the sum."""

    terms: Terms
    settings: SecureSettings
    size: int
    """Coordinates of an upload."""
    directory: Directory | None = None
    """Public keys by which the server looks at adverts itself, where it has them."""
    failures: dict[ClientId, str] = field(default_factory=dict)
    """Who dropped out of the sum, and why."""
    lost: dict[ClientId, str] = field(default_factory=dict)
    """Who did not answer at some step, and why; after its upload, its part is in the sum all the same."""
    survivors: tuple[ClientId, ...] = ()
    """Who is in the sum."""
    _adverts: dict[ClientId, Advert] = field(default_factory=dict)
    _context: bytes = b""
    _graph: Mapping[ClientId, tuple[ClientId, ...]] = field(default_factory=dict)
    _boxes: dict[ClientId, dict[ClientId, bytes]] = field(default_factory=dict)
    """By sender, by receiver."""
    _total: Words = field(default_factory=lambda: np.zeros(0, np.uint32))

    def run(self, clients: Sequence[ClientId], exchange: Exchange) -> Words:
        """Return (size,) words, the sum of the survivors' coordinates; its lowest R bits count.

        Raises:
            NotOpened: where fewer than the quorum are left at any step; `failures` says why the others are not.
        """
        self._introduce(clients, exchange)
        self._hand_shares(exchange)
        self._add_up(exchange)
        signatures = self._agree(exchange)
        return self._open(signatures, exchange)

    @property
    def number_bits(self) -> int:
        """Return R."""
        return width(len(self._adverts), self.settings.bits)

    @property
    def quorum(self) -> int:
        """Return the clients without which the sum stays closed."""
        return graph.quorum(self.settings.threshold, len(self._adverts))

    def _introduce(self, clients: Sequence[ClientId], exchange: Exchange) -> None:
        invitation = message(self.terms.told())
        # What others would refuse to take part with costs its sender its own place alone.
        own, shown = fresh_key(), set[bytes]()

        def advert(client: ClientId, data: bytes | memoryview) -> Advert:
            found = Advert.read(only_part(data))
            keys = {found.cipher, found.mask}
            if len(keys) < 2 or keys & shown:
                raise ValueError(f"{client} shows a key that was shown before")
            for key in keys:
                agreed(own, key)
            if self.directory is not None:
                words = self.terms.words("advert", self.settings, found.said(client))
                self.directory.check(client, words, found.signature)
            shown.update(keys)
            return found

        self._adverts = self._asked(
            "advertise", dict.fromkeys(clients, invitation), exchange, advert
        )
        self._check_number(len(self._adverts), self.settings.threshold)
        self._context = context_of(self.terms, self.settings, self._adverts)
        names = sorted(self._adverts)
        self._graph = graph.neighbours(names, self.settings.neighbours, context=self._context)

    def _hand_shares(self, exchange: Exchange) -> None:
        names = sorted(self._adverts)
        roster = message({"names": names}, [self._adverts[name].pieces() for name in names])

        def boxes(client: ClientId, data: bytes | memoryview) -> dict[ClientId, bytes]:
            told, parts = read(data)
            receivers = names_in(told, "names", len(parts))
            if {*receivers} != {*self._graph[client]}:
                raise ValueError(f"{client} sealed shares for others than its neighbours")
            if any(len(part) != BOX_BYTES for part in parts):
                raise ValueError(f"{client} sealed shares of the wrong length")
            return dict(zip(receivers, parts, strict=True))

        self._boxes = self._asked("share", dict.fromkeys(names, roster), exchange, boxes)
        self._check_number(len(self._boxes), self.quorum)

    def _add_up(self, exchange: Exchange) -> None:
        asked = {}
        for client in sorted(self._boxes):
            senders = [other for other in self._graph[client] if other in self._boxes]
            parts = [self._boxes[other][client] for other in senders]
            asked[client] = message({"names": senders}, parts)
        self._total = np.zeros(self.size, np.uint32)

        def added(_: ClientId, data: bytes | memoryview) -> bool:
            # Added up as it comes: no upload is kept.
            self._total += unpacked(only_part(data), self.number_bits, self.size)
            return True

        self.survivors = tuple(sorted(self._asked("upload", asked, exchange, added)))
        self._check_number(len(self.survivors), self.quorum)

    def _agree(self, exchange: Exchange) -> dict[ClientId, bytes]:
        asked = message({"names": list(self.survivors)})
        words = consent_words(self._context, self.survivors)

        def signature(client: ClientId, data: bytes | memoryview) -> bytes:
            part = only_part(data)
            if self.directory is not None:
                self.directory.check(client, words, part)
            return part

        # Who is gone by now is in the sum all the same: the others hold shares of its secrets.
        left = dict.fromkeys(self.survivors, asked)
        signatures = self._asked("consent", left, exchange, signature, late=True)
        self._check_number(len(signatures), self.quorum)
        return signatures

    def _open(self, signatures: Mapping[ClientId, bytes], exchange: Exchange) -> Words:
        asked, order = dict[ClientId, bytes](), dict[ClientId, list[tuple[str, ClientId]]]()
        signers = sorted(signatures)
        for client in signers:
            known = sorted({client, *(o for o in self._graph[client] if o in self._boxes)})
            alive = [other for other in known if other in self.survivors]
            dead = [other for other in known if other not in self.survivors]
            order[client] = [*(("alive", o) for o in alive), *(("dead", o) for o in dead)]
            told = {"alive": alive, "dead": dead, "signers": signers}
            asked[client] = message(told, [signatures[signer] for signer in signers])

        def revealed(client: ClientId, data: bytes | memoryview) -> Sequence[bytes]:
            _, parts = read(data)
            if len(parts) != len(order[client]):
                raise ValueError(f"{client} revealed {len(parts)} shares of {len(order[client])}")
            for part in parts:
                element(part)
            return parts

        shares: dict[tuple[str, ClientId], dict[int, bytes]] = {}
        for client, parts in self._asked("reveal", asked, exchange, revealed, late=True).items():
            for (kind, other), part in zip(order[client], parts, strict=True):
                place = sorted((*self._graph[other], other)).index(client) + 1
                shares.setdefault((kind, other), {})[place] = part
        return self._unmasked(shares)

    def _unmasked(self, shares: Mapping[tuple[str, ClientId], Mapping[int, bytes]]) -> Words:
        total = self._total
        for client in self.survivors:
            seed = self._secret("alive", client, shares)
            if hashlib.sha256(seed).digest() != self._adverts[client].commitment:
                raise NotOpened(f"the shares of {client} are not those of its secret")
            total = total - mask(derived(seed, salt=self._context, info=b"own mask"), self.size)
        for client in sorted(self._boxes.keys() - {*self.survivors}):
            neighbours = [other for other in self._graph[client] if other in self.survivors]
            if not neighbours:
                continue
            key = key_of(self._secret("dead", client, shares))
            if key.public_key().public_bytes_raw() != self._adverts[client].mask:
                raise NotOpened(f"the shares of {client} are not those of its key")
            for other in neighbours:
                pair = mask(pair_key(key, self._adverts[other].mask, self._context), self.size)
                # What the one who is left added, or took away.
                total = total - pair if client > other else total + pair
        return total

    def _secret(
        self,
        kind: str,
        client: ClientId,
        shares: Mapping[tuple[str, ClientId], Mapping[int, bytes]],
    ) -> bytes:
        number, holders = len(self._adverts), len(self._graph[client]) + 1
        needed = graph.shares_needed(self.settings.threshold, number, holders)
        found = shares.get((kind, client), {})
        if len(found) < needed:
            raise NotOpened(
                f"{len(found)} of the {needed} shares that the masks of {client} need were revealed"
            )
        try:
            return combine(dict(sorted(found.items())[:needed]))
        except ValueError as error:
            raise NotOpened(f"the shares of {client}: {error}") from error

    def _asked(
        self,
        step: Step,
        messages: Mapping[ClientId, bytes],
        exchange: Exchange,
        reading: Callable[[ClientId, bytes | memoryview], T],
        *,
        late: bool = False,
    ) -> dict[ClientId, T]:
        """Return what came of each answer; of who gave none, note why, unless it is in the sum already."""
        found: dict[ClientId, T] = {}
        for client, answer in exchange(step, messages).items():
            try:
                if isinstance(answer, str):
                    raise ValueError(answer)
                found[client] = reading(client, answer)
            except ValueError as error:
                self.lost[client] = str(error)
                if not late:
                    self.failures[client] = str(error)
        return found

    def _check_number(self, found: int, needed: int) -> None:
        if found < needed:
            raise NotOpened(
                f"a secure sum needs {needed} clients (secure.threshold, and more than half), {found} are left"
            )
