"""A site that sends anything at all: every honest reply of every round counts, and memory stays as it is."""

import json
import math
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psutil
import pytest
import torch
from tests.engines.test_remote import COUNTS, GREETING, Office, Talk

from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.protocols import Reply, Task
from fedloom.engines.flower.app import _opened
from fedloom.engines.remote import Remote
from fedloom.engines.requests import Envelope, Requests
from fedloom.wire.body import encode_body
from fedloom.wire.compact import deflate, write_lengths
from fedloom.wire.format import decode_task, encode_reply
from fedloom.wire.wire_settings import WireSettings

DOWN = {"params": {"w": torch.zeros(40), "b": torch.zeros(3)}}
VALUES: list[Any] = [
    *(0, -1, 1, 2**63, 10**400, -(10**400), 1e300, -1e300, math.nan, math.inf, -math.inf, 1e-320),
    *(True, False, None, "", "x", "[/x]", "\x1b[31m", "\ud800", "<script>", "a" * 5000),
    *([], [1], {}, {"a": {}}, [[[[]]]]),
]
BOMB = encode_body({"delta": {"w": torch.zeros(1 << 22, dtype=torch.bool)}})
"""Of some sixty bytes, and of four million decoded."""
CROWD = 50
EVIL = [f"evil-{i}" for i in range(CROWD)]
NAMES = [
    "loss",
    "num_tokens",
    "num_examples",
    "personal/loss",
    "x",
    "",
    "[/x]",
    "\ud800",
    "k" * 300,
]


def honest(envelope: Envelope) -> Envelope:
    if envelope.header["kind"] == "hello":
        clients = {name: {"profile": {}, "counts": COUNTS} for name in envelope.header["to"]}
        return Envelope({**GREETING, "clients": clients})
    tasks = [
        decode_task(envelope.pieces[h] + envelope.pieces[b]) for h, b in envelope.header["tasks"]
    ]
    delta = {"w": torch.ones(40), "b": torch.ones(3)}
    replies = [
        Reply(t.client, {"delta": delta}, 4.0, {"loss": 1.0, "num_tokens": 9.0}) for t in tasks
    ]
    messages = [encode_reply(reply, settings=WireSettings()) for reply in replies]
    return Envelope({"answers": [None] * len(messages)}, messages)


def message(chance: random.Random, client: str) -> bytes:
    """Return a reply that is damaged, of other tensors, or whose header holds anything."""
    metrics = {chance.choice(NAMES): chance.choice(VALUES) for _ in range(chance.randrange(4))}
    header = {"client": client, "weight": 1.0, "metrics": metrics}
    if chance.random() < 0.5:
        header[chance.choice(["client", "weight", "metrics", "more"])] = chance.choice(VALUES)
    shape = chance.choice([(40,), (41,), (0,), (2, 20)])
    kind = chance.choice([torch.float32, torch.float64, torch.bool, torch.int64])
    groups = [
        {"w": torch.zeros(shape, dtype=kind), "b": torch.zeros(3)},
        {"w": torch.full((40,), math.nan)},
        {"w": torch.ones(40)},
    ]
    upload = {chance.choice(["delta", "x", ""]): chance.choice(groups)}
    text = json.dumps(header)
    body = BOMB if chance.random() < 0.1 else encode_body(upload)
    made = bytearray(sealed(text, body))
    if chance.random() < 0.3:
        for _ in range(chance.choice([1, 3, 20])):
            made[chance.randrange(len(made))] = chance.randrange(256)
    return bytes(made[: chance.choice([len(made), len(made), chance.randrange(len(made) + 1)])])


def sealed(text: str, body: bytes) -> bytes:
    """Frame any text, surrogates and all, under a right checksum."""
    squeezed = deflate(text.encode("utf-8", "surrogatepass"))
    head = struct.pack("<4sB", b"FDLM", 1) + write_lengths(len(squeezed), len(body))
    return head + struct.pack("<I", zlib.crc32(squeezed, zlib.crc32(head))) + squeezed + body


def letter_of(chance: random.Random) -> Envelope | str:
    """Return a reply for every client of the attacker's, or now and then an envelope that is odd as a whole."""
    odd = chance.random()
    if odd < 0.8:
        return Envelope({"answers": [None] * CROWD}, [message(chance, name) for name in EVIL])
    if odd < 0.87:
        return Envelope({chance.choice(["answers", "refusal", "x"]): chance.choice(VALUES)}, [b"?"])
    if odd < 0.94:
        return Envelope({"answers": [chance.choice(VALUES)] * CROWD}, [b""] * chance.randrange(3))
    return str(chance.choice(VALUES))


def attacked(rounds: int, evil: Callable[[], Envelope | str]) -> tuple[int, int]:
    """Return (honest replies, replies of the attacker that passed) of so many rounds."""

    def hostile(envelope: Envelope) -> Envelope | str:
        return honest(envelope) if envelope.header["kind"] == "hello" else evil()

    def told(to: Sequence[str], talk: Talk) -> Talk:
        return lambda envelope: talk(Envelope({**envelope.header, "to": to}, envelope.pieces))

    office = Office(
        {
            "alba": told(["alba"], honest),
            "brno": told(["brno"], honest),
            "evil": told(EVIL, hostile),
        }
    )
    requests = Requests(office, clock=lambda: 0.0, sleep=lambda _: None)
    engine = Remote(FedAvg(), WireSettings(), requests, GREETING, deadline=10.0)
    engine.meet(list(office.talks), seconds=10)
    good = passed = 0
    for number in range(rounds):
        tasks = [Task("train", number + 1, n, 0, {}, DOWN) for n in ("alba", *EVIL, "brno")]
        for delivery in engine.run(tasks):
            answer = delivery.answer
            if answer.client not in EVIL:
                good += isinstance(answer, Reply)
            elif isinstance(answer, Reply):
                passed += 1
            else:
                assert answer.reason.isprintable()
                assert not set("[]<>") & set(answer.reason)
    return good, passed


def check(rounds: int, chance: random.Random) -> None:
    good, passed = attacked(rounds, lambda: letter_of(chance))
    assert good == 2 * rounds
    assert passed < rounds * CROWD / 20, "most of these are no reply at all"


def test_whatever_one_site_sends_the_others_count() -> None:
    check(20, random.Random(0))


def test_what_one_site_sends_takes_no_memory() -> None:
    """At most what a header of 64 KiB takes when it is read."""
    peaks = []
    for evil in (
        lambda: Envelope({"answers": ["no data"] * CROWD}),
        partial(letter_of, random.Random(1)),
    ):
        attacked(2, evil)
        tracemalloc.start()
        attacked(4, evil)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    quiet, loud = peaks
    assert loud < quiet + (1 << 21)


@pytest.mark.slow
def test_a_hundred_thousand_hostile_replies() -> None:
    """A server with two honest sites, and one that sends 100,000 replies of any kind; memory stays as it was."""
    chance = random.Random(2)
    check(20, chance)
    before = psutil.Process().memory_info().rss
    check(100_000 // CROWD, chance)
    assert psutil.Process().memory_info().rss < 1.2 * before


@pytest.mark.parametrize("text", ["", "5", "null", '{"header": 5, "sizes": []}', "[" * 100_000])
def test_a_letter_that_is_none_is_refused_with_a_plain_error(text: str) -> None:
    content: Any = {"envelope": {"text": text}, "chunks": {}}
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError, RecursionError)):
        _opened(content)
