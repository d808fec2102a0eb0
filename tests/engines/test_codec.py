"""Hostile and unlucky messages: each a failure that names the field, and the round goes on."""

import dataclasses
import math
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.metrics import MEASURED
from fedloom.core.protocols import ClientFailure, Delivery, Reply, Task
from fedloom.engines.codec import MessageCodec
from fedloom.wire.body import encode_body
from fedloom.wire.format import encode_reply
from fedloom.wire.frame import frame, split
from fedloom.wire.wire_settings import WireSettings

WIRE = WireSettings()
TASK = Task("train", 1, "c", 7, {}, {"params": {"w": torch.zeros(3), "b": torch.zeros(2)}})
GOOD = Reply("c", {"delta": {"w": torch.ones(3), "b": torch.ones(2)}}, 2.0, {"loss": 1.0})

NOT_WEIGHTS: tuple[Any, ...] = (-1, -1e-9, 1e300, 10**400, math.nan, math.inf, True, None, "1", [1])
NOT_LOSSES: tuple[Any, ...] = (-0.5, 1e7, 10**400, math.nan, math.inf, False, None, "1", {})


def received(message: bytes) -> Delivery:
    return MessageCodec(FedAvg(), WIRE).receive(TASK, message, download_bytes=5)


def test_a_good_reply_arrives_with_its_bytes() -> None:
    message = encode_reply(GOOD, settings=WIRE)
    delivery = received(message)
    assert isinstance(delivery.answer, Reply)
    assert delivery.answer.weight == 2
    assert (delivery.download_bytes, delivery.upload_bytes) == (5, len(message))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda d: {"delta": {**d, "w": d["w"][:2]}},
            r"upload delta/w: expected float32 \(3,\), got float32 \(2,\)",
        ),
        (
            lambda d: {"delta": {**d, "w": d["w"].double()}},
            r"upload delta/w: expected float32 \(3,\), got float64 \(3,\)",
        ),
        (
            lambda d: {"delta": {"w": d["w"]}},
            r"upload delta/b: expected float32 \(2,\), got nothing",
        ),
        (lambda d: {"delta": d, "more": d}, r"upload more/b: expected nothing, got float32 \(2,\)"),
        (lambda d: {"delta": {**d, "w": d["w"] * float("nan")}}, r"upload delta/w is not finite"),
        (lambda d: {"delta": {**d, "b": d["b"] * float("inf")}}, r"upload delta/b is not finite"),
    ],
)
def test_a_wrong_upload_is_an_absence_that_names_the_field(
    spoil: Callable[[Any], Any], reason: str
) -> None:
    upload = spoil(GOOD.upload["delta"])
    answer = received(encode_reply(dataclasses.replace(GOOD, upload=upload), settings=WIRE)).answer
    assert isinstance(answer, ClientFailure)
    assert answer.client == "c"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(answer.reason)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda m: m[:-1],
        lambda m: m[:10],
        lambda m: b"",
        lambda m: m + b"x",
        lambda m: m[:40] + bytes([m[40] ^ 1]) + m[41:],
        lambda m: b"NOPE" + m[4:],
    ],
)
def test_a_damaged_message_is_an_absence(tamper: Callable[[bytes], bytes]) -> None:
    delivery = received(tamper(encode_reply(GOOD, settings=WIRE)))
    assert isinstance(delivery.answer, ClientFailure)
    assert delivery.answer.reason


def test_a_reply_in_another_clients_name_is_refused() -> None:
    answer = received(encode_reply(dataclasses.replace(GOOD, client="d"), settings=WIRE)).answer
    assert answer == ClientFailure("c", "a reply for c names d")


def test_clients_that_share_a_payload_share_its_encoding() -> None:
    codec = MessageCodec(FedAvg(), WIRE)
    other = dataclasses.replace(TASK, client="d")
    (a, bytes_a), (b, bytes_b) = codec.deliver([TASK, other])
    assert a.download is b.download
    assert a.download is not TASK.download
    body = codec.bodies([TASK])[id(TASK.download)]
    assert bytes_a == len(codec.message(TASK, body))
    assert bytes_b == len(codec.message(other, body))


def sent(task: Task = TASK, reply: Reply = GOOD, **header: Any) -> Delivery:
    """Return what becomes of a reply whose header was tampered with, under a right checksum."""
    (known, body) = split(encode_reply(reply, settings=WIRE))
    return MessageCodec(FedAvg(), WIRE).receive(
        task, frame(bytes(body), {**known, **header}), download_bytes=5
    )


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        *(({"weight": weight}, r"weight must be a number in \(0, ") for weight in NOT_WEIGHTS),
        *(({"metrics": {"loss": loss}}, "loss must be ") for loss in NOT_LOSSES),
        ({"metrics": {"num_tokens": -1e6}}, r"num_tokens must be in \(0, "),
        ({"metrics": {"token_accuracy": 1.01}}, r"token_accuracy must be in \(0, 1\)"),
        ({"metrics": {"personal/exact_match": 2}}, "personal/exact_match must be in"),
        (
            {"metrics": {"<script>": 1.0}},
            r"got a metric '\(script\)', which must be one of .*loss, ",
        ),
        ({"metrics": {"\ud800": 1.0}}, "which must be one of"),
        ({"metrics": {f"k{i}": 1.0 for i in range(9)}}, "which must be one of"),
        ({"metrics": {f"k{i}": 1.0 for i in range(100_000)}}, "the header has .* bytes"),
        ({"metrics": []}, "the header of the reply is malformed"),
        ({"client": 5}, "the header of the reply is malformed"),
        ({"more": 1}, "the header of the reply is malformed"),
        ({"client": "\x1b]0;x\x07[/red]"}, r"a reply for c names  \)0;x \(/red\)"),
    ],
)
def test_a_header_of_another_type_size_or_range_is_an_absence(header: Any, reason: str) -> None:
    answer = sent(**header).answer
    assert isinstance(answer, ClientFailure)
    assert re.search(reason, answer.reason), answer.reason
    assert answer.reason.isprintable()
    assert not set("[]<>") & set(answer.reason)


@pytest.mark.parametrize("missing", MEASURED)
def test_an_evaluation_that_could_not_be_averaged_is_an_absence(missing: str) -> None:
    whole = {"loss": 1.0, "num_tokens": 4.0, "num_examples": 2.0}
    task = dataclasses.replace(TASK, kind="test")
    nothing = Reply("c", {}, 2.0, whole)
    assert isinstance(sent(task, nothing).answer, Reply)
    told = {name: value for name, value in whole.items() if name != missing}
    answer = sent(task, nothing, metrics=told).answer
    assert isinstance(answer, ClientFailure)
    assert f"got no {missing}" in answer.reason
    empty = sent(task, nothing, metrics={**whole, "num_examples": 0}).answer
    assert isinstance(empty, ClientFailure)


def test_a_diverged_model_may_say_so_in_an_evaluation_and_nowhere_else() -> None:
    told = {"loss": math.nan, "num_tokens": 4.0, "num_examples": 2.0}
    assert isinstance(sent(metrics=told).answer, ClientFailure)
    task = dataclasses.replace(TASK, kind="test")
    assert isinstance(sent(task, Reply("c"), metrics=told).answer, Reply)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_small_message_that_would_fill_the_memory_is_refused_before_it_does(
    compression: Any,
) -> None:
    """Sixty bytes describe a mask of 4 GB: what was asked for is known before anything is allocated."""
    mask = torch.zeros(1, dtype=torch.bool).expand(1 << 27)
    bomb = encode_body({"delta": {"w": mask}}, compression=compression)
    assert len(bomb) < 200
    message = frame(bomb, {"client": "c", "weight": 1.0, "metrics": {}})
    tracemalloc.start()
    answer = received(message).answer
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(answer, ClientFailure)
    assert "upload delta/b: expected float32 (2,), got nothing" in answer.reason
    assert most < 1 << 22
