"""Tasks and replies: what they cost, and what is no task."""

import math

import pytest
import torch
from torch import Tensor

from fedloom.core.protocols import Payload, Reply, Task
from fedloom.wire.body import decode_body, encode_body
from fedloom.wire.format import (
    WireError,
    decode,
    decode_reply,
    decode_task,
    encode,
    encode_reply,
    encode_task,
)
from fedloom.wire.frame import frame, split
from fedloom.wire.quantize import BLOCK
from fedloom.wire.wire_settings import ValueType, WireSettings


def same(a: Payload, b: Payload) -> bool:
    return {g: [*p] for g, p in a.items()} == {g: [*p] for g, p in b.items()} and all(
        torch.equal(tensor, b[group][name])
        for group, params in a.items()
        for name, tensor in params.items()
    )


def lora(num_layers: int = 15, rank: int = 8, width: int = 64) -> dict[str, Tensor]:
    """Return an adapter of 2 tensors a layer under the names peft gives them, 2 kB each."""
    g = torch.Generator().manual_seed(0)
    return {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{factor}.weight": torch.randn(
            (rank, width) if factor == "A" else (width, rank), generator=g
        )
        for i in range(num_layers)
        for factor in "AB"
    }


@pytest.mark.parametrize(
    ("values", "bits"),
    [("float32", 32), ("bfloat16", 16), ("float16", 16), ("int8", 8), ("int4", 4)],
)
def test_an_adapter_costs_its_payload_and_at_most_two_percent_and_two_kilobytes(
    values: ValueType, bits: int
) -> None:
    num_entries = sum(tensor.numel() for tensor in lora().values())
    scales = num_entries // BLOCK * 4 if values in ("int8", "int4") else 0
    payload_bytes = num_entries * bits // 8 + scales
    task = Task("train", 3, "client-003", 2**62, {"tier": "large"}, {"params": lora()})
    message = encode_task(task, settings=WireSettings(download=values))
    assert len(message) <= 1.02 * payload_bytes + 1000


def test_one_body_is_framed_for_many_clients() -> None:
    payload, wire = {"params": lora(2)}, WireSettings(download="int8")
    body = encode_body(payload, values="int8")
    for client in ("a", "b"):
        task = Task("train", 1, client, 5, {}, payload)
        message = encode_task(task, settings=wire, body=body)
        assert message == encode_task(task, settings=wire)
        assert bytes(split(message)[1]) == body
        assert decode_task(message).client == client
    assert same(decode_body(body), decode(frame(body)))


@pytest.mark.parametrize("kind", ["train", "validate", "test"])
def test_a_task_comes_back(kind: str) -> None:
    task = Task(kind, 7, "hôpital ☂", 2**63 - 1, {"language": "fi"}, {"params": lora(1)})  # type: ignore[arg-type]
    decoded = decode_task(encode_task(task, settings=WireSettings(compression="zstd")))
    assert same(decoded.download, task.download)
    assert decoded == Task(
        task.kind, task.round, task.client, task.seed, task.profile, decoded.download
    )


def test_a_reply_comes_back_with_its_metrics() -> None:
    reply = Reply("c", {"delta": lora(1)}, 0.1, {"loss": 1 / 3, "num_tokens": 12})
    decoded = decode_reply(encode_reply(reply, settings=WireSettings()))
    assert same(decoded.upload, reply.upload)
    assert decoded == Reply("c", decoded.upload, 0.1, {"loss": 1 / 3, "num_tokens": 12})


def test_the_loss_of_an_evaluation_may_be_nan() -> None:
    told = {"loss": math.nan, "num_tokens": 2.0, "num_examples": 1.0}
    message = encode_reply(Reply("c", metrics=told), settings=WireSettings())
    assert math.isnan(decode_reply(message, measured=True).metrics["loss"])
    with pytest.raises(WireError, match="loss must be in"):
        decode_reply(message)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "shutdown"},
        {"round": "1"},
        {"client": 4},
        {"seed": 2},
        {"profile": []},
        {"profile": {"tier": 3}},
        {"more": 1},
    ],
)
def test_a_malformed_task_is_refused(changes: dict[str, object]) -> None:
    header = {
        "kind": "train",
        "round": 1,
        "client": "c",
        "seed": "0" * 10,
        "profile": {},
        **changes,
    }
    with pytest.raises(WireError, match="the header of the task is malformed: "):
        decode_task(encode({}, header))


@pytest.mark.parametrize(
    ("digits", "message"),
    [
        ("", "has 0 digits to base 85, not 10"),
        ("00000", "has 5 digits to base 85, not 10"),
        ("0" * 11, "has 11 digits to base 85, not 10"),
        ("00000 0000", "is not to base 85: bad base85 character at position 5"),
        ("~" * 10, "is not to base 85: base85 overflow"),
        ("☂" * 10, "is not to base 85: "),
    ],
)
def test_a_seed_of_other_digits_is_refused(digits: str, message: str) -> None:
    header = {"kind": "train", "round": 1, "client": "c", "seed": digits, "profile": {}}
    with pytest.raises(WireError, match=f"the seed of the task {message}"):
        decode_task(encode({}, header))


@pytest.mark.parametrize("seed", [0, 85, 2**63 - 1, 2**64 - 1])
def test_a_seed_takes_ten_digits_and_comes_back(seed: int) -> None:
    message = encode_task(Task("train", 1, "c", seed, {}, {}), settings=WireSettings())
    assert len(str(split(message)[0]["seed"])) == 10
    assert decode_task(message).seed == seed


@pytest.mark.parametrize(
    "changes",
    [
        {"client": None},
        {"weight": "1"},
        {"weight": math.nan},
        {"weight": math.inf},
        {"metrics": {"loss": "low"}},
        {"metrics": 3},
        {"more": 1},
    ],
)
def test_a_malformed_reply_is_refused(changes: dict[str, object]) -> None:
    header = {"client": "c", "weight": 1.0, "metrics": {}, **changes}
    with pytest.raises(WireError, match="the header of the reply is malformed: "):
        decode_reply(encode({}, header))
