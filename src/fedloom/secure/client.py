"""A client's side of secure sums: what it answers, and what it refuses.

Practical Secure Aggregation for Privacy-Preserving Machine Learning. Bonawitz, Ivanov, Kreuter, Marcedone, McMahan,
Patel, Ramage, Segal, Seth, CCS 2017 (eprint 2017/281), figure 4, with its consistency check against a server that says
one thing to one client and another to another.

Secure Single-Server Aggregation with (Poly)Logarithmic Overhead. Bell, Bonawitz, Gascón, Lepoint, Raykova, CCS 2020
(eprint 2020/704): masks and shares among neighbours only.

Deviations: the graph follows from the hash of all fresh keys and not from a server's draw; everybody holds a share of
its own; the survivors' graph must not fall apart into pieces below the threshold, be it by shares that the server kept
back; the seed of a client's own mask is committed to, so that wrong shares are found out; the private key that is shared
is X25519's.
"""

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedloom.core.protocols import ClientError
from fedloom.secure import graph
from fedloom.secure.ciphers import (
    TAG_BYTES,
    Directory,
    Signer,
    agreed,
    derived,
    fresh_key,
    mask,
    opened,
    sealed,
)
from fedloom.secure.fixed_point import LARGEST_WIDE, Words, packed, width
from fedloom.secure.messages import Step, message, names_in, read
from fedloom.secure.settings import SecureSettings
from fedloom.secure.shamir import SHARE_BYTES, split
from fedloom.secure.terms import Advert, Terms, context_of

BOX_BYTES = 2 * SHARE_BYTES + TAG_BYTES
"""What one client seals for another: a share of either kind."""


@dataclass
class _Attempt:
    """What a client keeps of one attempt, in memory only, until the next begins."""

    terms: Terms
    cipher_key: Any = field(default_factory=fresh_key, repr=False)
    mask_key: Any = field(default_factory=fresh_key, repr=False)
    own_seed: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    adverts: Mapping[str, Advert] = field(default_factory=dict)
    context: bytes = b""
    graph: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own_shares: dict[str, bytes] = field(default_factory=dict, repr=False)
    """By kind, its own shares of its own secrets."""
    held: dict[str, bytes] = field(default_factory=dict, repr=False)
    """By neighbour, what it sealed for this client."""
    survivors: tuple[str, ...] = ()
    """Whom this client signed to be in the sum."""
    answered: dict[Step, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)
    """By step, the hash of what was asked, and the answer: what is asked again is answered alike."""

    def numbers(self, settings: SecureSettings) -> tuple[int, int]:
        """Return the quorum, and R."""
        number = len(self.adverts)
        return graph.quorum(settings.threshold, number), width(number, settings.bits)


@dataclass
class Party:
    """One client of secure sums; it takes part in one attempt at a time."""

    name: str
    settings: SecureSettings
    signer: Signer
    directory: Directory
    """The others' public keys, which did not come from the server."""
    run: str
    """The hash of the recipe that this client agreed to."""
    least: int = 0
    """Fewest clients that it is ever summed with, itself counted, whatever the recipe says."""
    _now: _Attempt | None = None

    @property
    def task(self) -> str:
        """Return the hash of the download that the attempt is about.

        Raises:
            ClientError: where there is none.
        """
        return self._attempt().terms.task

    @property
    def others(self) -> tuple[str, ...]:
        """Return whose masks its upload has in common, of the attempt that goes on."""
        return self._attempt().graph.get(self.name, ())

    def answer(
        self, step: Step, data: bytes | memoryview, vector: Callable[[Terms], Words] | None = None
    ) -> bytes:
        """Return the answer to a message, the same one to the same message.

        Args:
            step: What is asked for.
            data: The server's message.
            vector: Makes the coordinates to upload; for that step only.

        Raises:
            ClientError: where it is not what an honest server asks; nothing is revealed then, and the attempt is over for
                this client.
        """
        asked = hashlib.sha256(data).digest()
        try:
            if step == "advertise":
                return self._advertise(asked, *read(data))
            now = self._attempt()
            if step in now.answered:
                before, answer = now.answered[step]
                if before == asked:
                    return answer
                self._refuse_twice(step, now, data)
            if step == "upload":
                assert vector is not None
                answer = self._upload(now, *read(data), vector)
            else:
                steps = {"share": self._share, "consent": self._consent, "reveal": self._reveal}
                answer = steps[step](now, *read(data))
        except ValueError as error:
            self._now = None
            raise ClientError(str(error)) from error
        except ClientError:
            self._now = None
            raise
        now.answered[step] = asked, answer
        return answer

    def _attempt(self) -> _Attempt:
        if self._now is None:
            raise ClientError(
                f"{self.name} takes no part in this secure sum: it was started again since, or refused it"
            )
        return self._now

    def _advertise(self, asked: bytes, told: dict[str, Any], parts: Sequence[bytes]) -> bytes:
        match told:
            case {
                "round": int(round),
                "attempt": str(attempt),
                "task": str(task),
                "heaviest": int() | float() as heaviest,
            } if len(attempt) == 32 and 0 < heaviest < LARGEST_WIDE:
                terms = Terms(self.run, round, attempt, task, heaviest)
            case _:
                raise ValueError("a message of a secure sum is malformed: it has no terms")
        # Asked again, be it in the same words: fresh keys, as the old ones may have been answered with.
        now = self._now = _Attempt(terms)
        unsigned = Advert(
            now.cipher_key.public_key().public_bytes_raw(),
            now.mask_key.public_key().public_bytes_raw(),
            hashlib.sha256(now.own_seed).digest(),
            b"",
        )
        signature = self.signer.sign(terms.words("advert", self.settings, unsigned.said(self.name)))
        return message({}, [unsigned.pieces() + signature])

    def _share(self, now: _Attempt, told: dict[str, Any], parts: Sequence[bytes]) -> bytes:
        names = names_in(told, "names", len(parts))
        adverts = {n: Advert.read(part) for n, part in zip(names, parts, strict=True)}
        least = max(self.settings.threshold, self.least)
        if len(adverts) < least:
            raise ValueError(
                f"a secure sum of {len(adverts)} clients is fewer than the {least} that {self.name} takes part in"
            )
        own = adverts.get(self.name)
        if own is None or own.mask != now.mask_key.public_key().public_bytes_raw():
            raise ValueError(f"the server shows others another key of {self.name} than its own")
        for name, advert in adverts.items():
            words = now.terms.words("advert", self.settings, advert.said(name))
            self.directory.check(name, words, advert.signature)
        keys = [key for advert in adverts.values() for key in (advert.cipher, advert.mask)]
        if len({*keys}) != len(keys):
            raise ValueError("two clients of a secure sum show the same key")
        now.adverts = adverts
        now.context = context_of(now.terms, self.settings, adverts)
        now.graph = graph.neighbours(sorted(adverts), self.settings.neighbours, context=now.context)
        return self._sealed_shares(now)

    def _sealed_shares(self, now: _Attempt) -> bytes:
        others = now.graph[self.name]
        holders = sorted((*others, self.name))
        needed = graph.shares_needed(self.settings.threshold, len(now.adverts), len(holders))
        seeds = split(now.own_seed, threshold=needed, holders=len(holders))
        keys = split(now.mask_key.private_bytes_raw(), threshold=needed, holders=len(holders))
        by_holder = dict(zip(holders, zip(seeds, keys, strict=True), strict=True))
        seed, key = by_holder.pop(self.name)
        now.own_shares = {"alive": seed, "dead": key}
        boxes = [
            sealed(
                self._sealing_key(now, self.name, other, other),
                seed + key,
                about=now.context,
            )
            for other, (seed, key) in by_holder.items()
        ]
        return message({"names": list(by_holder)}, boxes)

    def _sealing_key(self, now: _Attempt, sender: str, receiver: str, other: str) -> bytes:
        secret = agreed(now.cipher_key, now.adverts[other].cipher)
        info = f"share of {sender} for {receiver}".encode()
        return derived(secret, salt=now.context, info=info)

    def _upload(
        self,
        now: _Attempt,
        told: dict[str, Any],
        parts: Sequence[bytes],
        vector: Callable[[Terms], Words],
    ) -> bytes:
        if not now.graph:
            raise ValueError("the server asks for an upload before it showed the others' keys")
        names = names_in(told, "names", len(parts))
        if strangers := {*names} - {*now.graph[self.name]}:
            raise ValueError(f"{min(strangers)} is no neighbour of {self.name} in this secure sum")
        needed = graph.shares_needed(
            self.settings.threshold, len(now.adverts), len(now.graph[self.name]) + 1
        )
        if len(names) + 1 < needed:
            raise ValueError(
                f"only {len(names)} neighbours of {self.name} shared their secrets, {needed - 1} are needed"
            )
        if any(len(part) != BOX_BYTES for part in parts):
            raise ValueError("a sealed share is of the wrong length")
        now.held = dict(zip(names, parts, strict=True))
        _, number_bits = now.numbers(self.settings)
        total = vector(now.terms).copy()
        key = derived(now.own_seed, salt=now.context, info=b"own mask")
        total += mask(key, len(total))
        for other in names:
            pair = mask(pair_key(now.mask_key, now.adverts[other].mask, now.context), len(total))
            # Of every two, one adds what the other takes away.
            total = total + pair if other > self.name else total - pair
        return message({}, [packed(total, number_bits)])

    def _consent(self, now: _Attempt, told: dict[str, Any], parts: Sequence[bytes]) -> bytes:
        if "upload" not in now.answered:
            raise ValueError("the server asks who is in a secure sum before the upload")
        names = names_in(told, "names")
        quorum, _ = now.numbers(self.settings)
        least = max(quorum, self.least)
        if strangers := {*names} - now.adverts.keys():
            raise ValueError(f"{min(strangers)} takes no part in this secure sum")
        if self.name not in names:
            raise ValueError(f"the server says that {self.name} is not in the sum, but it uploaded")
        if len(names) < least:
            raise ValueError(
                f"a secure sum of {len(names)} clients would be opened, {least} are needed at least"
            )
        # Without a mask in common the graph is not what it seems: it may fall apart into sums of a few.
        if unmasked := {*names} & {*now.graph[self.name]} - now.held.keys():
            raise ValueError(
                f"the server says that {min(unmasked)} is in the sum, whose shares it kept from {self.name}"
            )
        for piece in graph.pieces(now.graph, names):
            if len(piece) < max(self.settings.threshold, self.least):
                raise ValueError(
                    f"so many are gone that the sum of {', '.join(sorted(piece))} alone could be told: raise"
                    " secure.neighbours"
                )
        now.survivors = tuple(sorted(names))
        return message({}, [self.signer.sign(consent_words(now.context, now.survivors))])

    def _reveal(self, now: _Attempt, told: dict[str, Any], parts: Sequence[bytes]) -> bytes:
        if not now.survivors:
            raise ValueError("the server asks for shares before all agreed on who is in the sum")
        alive, dead = names_in(told, "alive"), names_in(told, "dead")
        self._refuse_both(now, alive, dead)
        signers = names_in(told, "signers", len(parts))
        quorum, _ = now.numbers(self.settings)
        words = consent_words(now.context, now.survivors)
        for signer, signature in zip(signers, parts, strict=True):
            if signer not in now.survivors:
                raise ValueError(f"{signer} agrees to a sum that it is not in")
            self.directory.check(signer, words, signature)
        if len(signers) < max(quorum, self.least):
            raise ValueError(
                f"only {len(signers)} clients agree on who is in the sum, {max(quorum, self.least)} are needed"
            )
        kinds = [*((name, "alive") for name in alive), *((name, "dead") for name in dead)]
        return message({}, [self._share_of(now, name, kind) for name, kind in kinds])

    def _refuse_both(self, now: _Attempt, alive: Sequence[str], dead: Sequence[str]) -> None:
        """Refuse to reveal anything but one kind of share of each: which one follows from who is in the sum.

        Raises:
            ValueError: with the name of whose upload would be opened.
        """
        if both := {*alive} & {*dead}:
            raise ValueError(_both(min(both)))
        mine = {*now.held, self.name}
        for name in sorted(mine):
            asked = name in alive, name in dead
            if name in now.survivors and asked != (True, False):
                raise ValueError(_both(name) if asked[1] else _OTHERS)
            if name not in now.survivors and asked != (False, True):
                raise ValueError(_both(name) if asked[0] else _OTHERS)
        if {*alive, *dead} - mine:
            raise ValueError(_OTHERS)

    def _refuse_twice(self, step: Step, now: _Attempt, data: bytes | memoryview) -> None:
        """Refuse a second, other question in one step.

        Raises:
            ValueError: always; it says whose share of the other kind is wanted.
        """
        others, here = set[str](), {*now.survivors}
        if step == "consent":
            others = here ^ {*names_in(read(data)[0], "names")}
        elif step == "reveal":
            told, _ = read(data)
            others = here & {*names_in(told, "dead")} | {*names_in(told, "alive")} - here
        if others:
            raise ValueError(_both(min(others)))
        raise ValueError(f"the server asks {self.name} twice for {step} in one secure sum")

    def _share_of(self, now: _Attempt, name: str, kind: str) -> bytes:
        if name == self.name:
            return now.own_shares[kind]
        key = self._sealing_key(now, name, self.name, name)
        try:
            both = opened(key, now.held[name], about=now.context)
        except ValueError as error:
            raise ValueError(f"{error}: that of {name}") from error
        return both[:SHARE_BYTES] if kind == "alive" else both[SHARE_BYTES:]


_OTHERS = "the server asks for shares of others than those who are in the sum, or dropped out of it"


def _both(name: str) -> str:
    return f"the server asks for both kinds of share of {name}, which together open its upload: nothing is revealed"


def pair_key(own: Any, other: bytes, context: bytes) -> bytes:
    """Return the key of the mask that two clients have in common."""
    return derived(agreed(own, other), salt=context, info=b"mask of two")


def consent_words(context: bytes, survivors: Sequence[str]) -> bytes:
    """Return what a client signs who agrees that these are in the sum."""
    return message({"context": context.hex(), "survivors": list(survivors)})
