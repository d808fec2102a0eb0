"""Tasks whose uploads are added up under masks: which go together, what is agreed on, and what comes of it.

An upload of a sum is never a reply: the site refuses to send one. What is measured goes as ever.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from fedloom.core.distributed_noise import AddsShares, NoiseShares
from fedloom.core.protocols import (
    Algorithm,
    ClientError,
    ClientFailure,
    ClientId,
    Delivery,
    Payload,
    Reply,
    Task,
)
from fedloom.core.rehearsal import rehearse
from fedloom.core.together import support_of
from fedloom.core.wrapper import layers
from fedloom.engines.codec import MessageCodec
from fedloom.engines.introductions import plain
from fedloom.secure.ciphers import Directory, Signer
from fedloom.secure.client import Party
from fedloom.secure.coordinates import Layout
from fedloom.secure.fixed_point import Words, width
from fedloom.secure.messages import Step
from fedloom.secure.server import Exchange, NotOpened, SumServer
from fedloom.secure.settings import SecureSettings
from fedloom.secure.terms import Terms, hash_of
from fedloom.wire.body import Piece, decode_body

RUN = "here"
"""What sums of this process are bound to in the place of a recipe that was agreed on."""
_BESIDE = 1 << 16
"""Bytes of an upload beside its entries: weight and metrics, at most."""
Post = Callable[[Step, Mapping[ClientId, bytes]], Mapping[ClientId, bytes | memoryview | str]]


@dataclass
class Sum:
    """Clients whose uploads are added up: they train from one download."""

    tasks: Sequence[Task]
    """As the server has them."""
    body: Piece
    """Their download, encoded."""
    codec: MessageCodec
    settings: SecureSettings
    run: str
    """The hash of the recipe."""
    downloaded: dict[ClientId, int] = field(default_factory=dict)
    """Bytes that went to each client."""
    uploaded: dict[ClientId, int] = field(default_factory=dict)
    """Bytes that came from each."""

    def deliveries(self, post: Post, directory: Directory | None = None) -> Iterator[Delivery]:
        """Yield a failure for each client that is not in the sum, and then the sum.

        Args:
            post: Brings messages to clients and their answers back.
            directory: Public keys of the clients, where the server has them.
        """
        clients = [task.client for task in self.tasks]
        read = replace(self.tasks[0], download=self.download)
        terms = Terms(
            self.run,
            read.round,
            secrets.token_hex(16),
            hash_of(self.body),
            self.heaviest,
        )
        layout = layout_of(self.codec, read, self.settings, terms.heaviest)
        server = SumServer(terms, self.settings, layout.size, directory)
        try:
            total = server.run(clients, self._counted(post))
            first = next(c for c in clients if c in server.survivors)
            number = len(server.survivors)
            reply, num_cut = layout.read(total, server.number_bits, client=first, count=number)
        except ValueError as error:
            yield from self._failed(dict.fromkeys(clients, str(error)) | server.failures)
            return
        yield from self._failed(server.failures)
        yield Delivery(
            reply,
            sum(self.downloaded.get(c, 0) for c in server.survivors),
            sum(self.uploaded.get(c, 0) for c in server.survivors),
            num_cut=num_cut,
        )

    def most_bytes(self) -> int:
        """Return a length that no upload exceeds: coordinates take 32 bits at most."""
        entries = sum(shape.numel() for _, shape in self.codec.expected(self.tasks[0]).values())
        return 4 * entries + _BESIDE

    def _counted(self, post: Post) -> Exchange:
        def exchange(
            step: Step, messages: Mapping[ClientId, bytes]
        ) -> Mapping[ClientId, bytes | memoryview | str]:
            answers = post(step, messages)
            for client, message in messages.items():
                answer = answers.get(client, "")
                known = self.downloaded.get(client, 0)
                self.downloaded[client] = known + len(message)
                if not isinstance(answer, str):
                    self.uploaded[client] = self.uploaded.get(client, 0) + len(answer)
            return answers

        return exchange

    def _failed(self, reasons: Mapping[ClientId, str]) -> Iterator[Delivery]:
        for task in self.tasks:
            if task.client in reasons:
                failure = ClientFailure(task.client, plain(reasons[task.client], 400))
                down, up = (found.get(task.client, 0) for found in (self.downloaded, self.uploaded))
                yield Delivery(failure, down, up)

    @cached_property
    def download(self) -> Payload:
        """Return it as clients read it."""
        return decode_body(self.body, max_bytes=self.codec.wire.max_bytes)

    @cached_property
    def heaviest(self) -> float:
        """Return the weight of a client with as many examples as any of these declared."""
        declared = [task.profile.get("num_examples", "") for task in self.tasks]
        most = max((int(text) for text in declared if text.isdecimal()), default=0)
        if not most:
            raise ValueError("secure needs clients whose profiles declare num_examples")
        weight = rehearse(self.codec.algorithm, self.tasks[0], num_examples=most).weight
        return float(weight)


def sums_of(
    tasks: Sequence[Task],
    bodies: Mapping[int, Piece],
    codec: MessageCodec,
    settings: SecureSettings,
    run: str,
) -> list[Sum]:
    """Return the sums of a round's tasks: one for each download and group, in the order of their first tasks.

    Args:
        tasks: Of one round.
        bodies: Their encoded downloads, by id.
        codec: Of their messages.
        settings: The recipe's.
        run: The hash of the recipe.
    """
    together: dict[tuple[str, str], list[Task]] = {}
    encoded: dict[tuple[str, str], Piece] = {}
    hashes = {key: hash_of(body) for key, body in bodies.items()}
    for task in tasks:
        key = (hashes[id(task.download)], task.group)
        together.setdefault(key, []).append(task)
        encoded[key] = bodies[id(task.download)]
    return [Sum(found, encoded[key], codec, settings, run) for key, found in together.items()]


def layout_of(codec: MessageCodec, task: Task, settings: SecureSettings, heaviest: float) -> Layout:
    """Return what coordinates a reply to a task has: the same on both sides.

    Args:
        codec: Of the messages.
        task: As its client reads it.
        settings: The recipe's.
        heaviest: What no client weighs more than.
    """
    support = support_of(codec.algorithm, task.download)
    expected = codec.expected(task)
    return Layout(expected, support, codec.metrics, settings.bits, settings.clip, heaviest)


def forecast(every: Sequence[Sum]) -> tuple[int, int]:
    """Return the bytes that go to and come from all clients of some sums, beside their tasks, without training any."""
    down, up = 0, 0
    for one in every:
        number, task = len(one.tasks), one.tasks[0]
        size = layout_of(one.codec, replace(task, download=one.download), one.settings, 1.0).size
        beside = _protocol_bytes(number, one.settings)
        down += beside[0]
        up += beside[1] + number * -(-size * width(number, one.settings.bits) // 8)
    return down, up


@lru_cache(maxsize=64)
def _protocol_bytes(number: int, settings: SecureSettings) -> tuple[int, int]:
    """Return the bytes to and from so many clients whose uploads hold nothing, by a sum that is played."""
    names = [f"client-{at}" for at in range(number)]
    signers = {name: Signer.fresh() for name in names}
    directory = Directory({name: signer.public for name, signer in signers.items()})
    parties = {n: Party(n, settings, signers[n], directory, RUN) for n in names}
    nothing: Words = np.zeros(0, np.uint32)
    sizes = [0, 0]

    def exchange(step: Step, messages: Mapping[ClientId, bytes]) -> dict[ClientId, bytes]:
        answers = {
            n: parties[n].answer(step, data, lambda _: nothing) for n, data in messages.items()
        }
        sizes[0] += sum(map(len, messages.values()))
        sizes[1] += sum(map(len, answers.values()))
        return answers

    terms = Terms(RUN, 1, secrets.token_hex(16), hash_of(b""), 1.0)
    with suppress(NotOpened):
        SumServer(terms, settings, 0, directory).run(names, exchange)
    return sizes[0], sizes[1]


def words_of(
    codec: MessageCodec, task: Task, reply: Reply, settings: SecureSettings, heaviest: float
) -> Words | str:
    """Return what a client uploads, (coordinates,) before any mask, or why its reply cannot be added up.

    Args:
        codec: Of the messages.
        task: As the client reads it.
        reply: As it would be sent.
        settings: The recipe's.
        heaviest: What no client weighs more than.
    """
    layout = layout_of(codec, task, settings, heaviest)
    # Rounded so, what `private` clipped is no longer than its clip.
    towards_zero = codec.algorithm.server_sees == "noisy mean"
    shares = shares_of(codec.algorithm)
    try:
        return layout.coordinates(
            reply,
            seed=task.seed,
            towards_zero=towards_zero,
            noise=shares.std if shares else 0.0,
        )
    except ClientError as refusal:
        return str(refusal)


def shares_of(algorithm: Algorithm[Any]) -> NoiseShares | None:
    """Return the noise that clients add to their uploads; None where they add none."""
    found = (layer.shares for layer in layers(algorithm) if isinstance(layer, AddsShares))
    return next(filter(None, found), None)


@dataclass(frozen=True)
class Played:
    """Sums among clients of this process: every party runs the same code as at a site, with keys of its own."""

    settings: SecureSettings
    before: frozenset[ClientId] = frozenset()
    """For tests: who is gone before its upload."""
    after: frozenset[ClientId] = frozenset()
    """For tests: who is gone after it."""
    heard: Callable[[Step, ClientId, bytes], None] = lambda *_: None
    """For tests: is shown all that the server receives."""
    _signers: dict[ClientId, Signer] = field(default_factory=dict)

    def deliveries(
        self, each: Sequence[Delivery], summed: Sum, words: Mapping[ClientId, Words | str]
    ) -> Iterator[Delivery]:
        """Yield what the server gets of one sum.

        Args:
            each: The clients' own deliveries, for the bytes of their downloads.
            summed: Who is in it.
            words: What each client would upload, or why it cannot.
        """
        clients = [task.client for task in summed.tasks]
        for client in clients:
            if client not in self._signers:
                self._signers[client] = Signer.fresh()
        directory = Directory({c: self._signers[c].public for c in clients})
        parties = {
            c: Party(c, self.settings, self._signers[c], directory, summed.run) for c in clients
        }
        summed.downloaded |= {d.answer.client: d.download_bytes for d in each}

        def post(step: Step, messages: Mapping[ClientId, bytes]) -> dict[ClientId, bytes | str]:
            return {c: self._answer(parties[c], step, data, words) for c, data in messages.items()}

        return summed.deliveries(post, directory)

    def _answer(
        self, party: Party, step: Step, data: bytes, words: Mapping[ClientId, Words | str]
    ) -> bytes | str:
        client = party.name
        gone = client in self.before and step in ("upload", "consent", "reveal")
        if gone or (client in self.after and step in ("consent", "reveal")):
            return "lost on the way"

        def vector(_: Terms) -> Words:
            own = words[client]
            if isinstance(own, str):
                raise ClientError(own)
            return own

        try:
            answer = party.answer(step, data, vector)
        except ClientError as refusal:
            return str(refusal)
        self.heard(step, client, answer)
        return answer
