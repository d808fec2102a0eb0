"""Hostile and unlucky messages: each an absence that names the field, and the round goes on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.protocols import Absence, Delivery, Reply, Task
from fedloom.engines.courier import Courier
from fedloom.wire.format import encode_reply
from fedloom.wire.settings import WireSettings

WIRE = WireSettings()
TASK = Task("train", 1, "c", 7, {}, {"params": {"w": torch.zeros(3), "b": torch.zeros(2)}})
GOOD = Reply("c", {"delta": {"w": torch.ones(3), "b": torch.ones(2)}}, 2.0, {"loss": 1.0})


def received(message: bytes) -> Delivery:
    return Courier(FedAvg(), WIRE).receive(TASK, message, download_bytes=5)


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
    assert isinstance(answer, Absence)
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
    assert isinstance(delivery.answer, Absence)
    assert delivery.answer.reason


def test_a_reply_in_another_clients_name_is_refused() -> None:
    answer = received(encode_reply(dataclasses.replace(GOOD, client="d"), settings=WIRE)).answer
    assert answer == Absence("c", "a reply for c names d")


def test_clients_that_share_a_payload_share_its_encoding() -> None:
    courier = Courier(FedAvg(), WIRE)
    other = dataclasses.replace(TASK, client="d")
    (a, bytes_a), (b, bytes_b) = courier.deliver([TASK, other])
    assert a.download is b.download
    assert a.download is not TASK.download
    body = courier.bodies([TASK])[id(TASK.download)]
    assert bytes_a == len(courier.message(TASK, body))
    assert bytes_b == len(courier.message(other, body))
