"""Messages from strangers: refused by name, without a crash and without memory."""

import json
import random
import resource
import struct
import time
import tracemalloc
import zlib
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.core.protocols import Reply, Task
from fedloom.wire.compact import deflate, inflate, read_lengths, write_lengths
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
from fedloom.wire.positions import POSITION_CODECS
from fedloom.wire.table import DTYPES, MAX_JSON_BYTES
from fedloom.wire.wire_settings import WireSettings

LIMIT = 1 << 20


def seal(table: Any, blocks: bytes = b"", *, compression: int = 0, **changes: int) -> bytes:
    """Return a message with right checksums around any table and any blocks."""
    text = deflate(table if isinstance(table, bytes) else json.dumps(table).encode())
    content = text + blocks
    num_bytes = changes.get("num_bytes", len(content))
    if compression == 1:
        content = zstandard.ZstdCompressor().compress(content)
    lengths = [changes.get("table_bytes", len(text)), num_bytes][: 2 if compression else 1]
    head = bytes([compression]) + write_lengths(*lengths)
    return frame(head + struct.pack("<I", zlib.crc32(content, zlib.crc32(head))) + content)


def sample(compression: Any = "none") -> bytes:
    """Return a message with every kind of block."""
    g = torch.Generator().manual_seed(0)
    few = torch.randn(600, generator=g) * (torch.rand(600, generator=g) < 0.02)
    many = torch.randn(600, generator=g) * (torch.rand(600, generator=g) < 0.4)
    payload = {
        "delta": {"few": few, "many": many, "dense": torch.randn(9, 5, generator=g)},
        "mask": {"dense": torch.ones(7, dtype=torch.bool), "half": few[:90].bfloat16()},
        "empty": {},
    }
    return encode(payload, {"client": "c", "n": 1}, values="int8", compression=compression)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_flipped_bit_anywhere_is_noticed(compression: str) -> None:
    message = sample(compression)
    for at in range(len(message)):
        damaged = bytearray(message)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(WireError):
            decode(bytes(damaged))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_message_cut_anywhere_is_noticed(compression: str) -> None:
    message = sample(compression)
    for length in range(len(message)):
        with pytest.raises(WireError):
            decode(message[:length])


def test_anything_after_the_end_is_noticed() -> None:
    with pytest.raises(WireError, match="bytes and announces"):
        decode(sample() + b"\x00")


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    for prefix in (b"", b"FDLM\x01", b"FDLM\x01\x03\x00"):
        for read in (decode, decode_task, decode_reply):
            with pytest.raises(WireError):
                read(prefix + data)


def test_damage_under_a_right_checksum_is_refused_or_decoded_within_the_limit() -> None:
    """Thousands of mutations of table and blocks, sealed again."""
    message = sample()
    body = split(message)[1]
    (stored,), end = read_lengths(body, 1, 1)
    table = inflate(body[end + 4 : end + 4 + stored], None)
    table_bytes, content = len(table), table + bytes(body[end + 4 + stored :])
    chance = random.Random(0)
    refused = 0
    for _ in range(4000):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 5))):
            end = table_bytes if chance.random() < 0.7 else len(damaged)
            at = chance.randrange(end)
            damaged[at] = chance.choice(b'0123456789[]",-') if at < table_bytes else 255
        cut = chance.choice((len(damaged), len(damaged), chance.randrange(len(damaged) + 1)))
        data = seal(bytes(damaged[:table_bytes]), bytes(damaged[table_bytes:cut]))
        try:
            payload = decode(data, max_bytes=LIMIT)
        except WireError:
            refused += 1
        else:
            tensors = [tensor for params in payload.values() for tensor in params.values()]
            assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= LIMIT
    assert refused > 2000


def strange(message: bytes, chance: random.Random) -> bytes:
    """Return random, truncated, bit-flipped or extended bytes: nothing that was ever sent."""
    match chance.randrange(4):
        case 0:
            prefix = message[: chance.choice((0, 4, 5, 6, 8, 12, 60))]
            return prefix + chance.randbytes(chance.randrange(80))
        case 1:
            return message[: chance.randrange(len(message))]
        case 2:
            damaged = bytearray(message)
            for at in chance.sample(range(8 * len(message)), chance.choice((1, 1, 1, 2, 3, 17))):
                damaged[at // 8] ^= 1 << at % 8
            return bytes(damaged)
        case _:
            return message + chance.randbytes(chance.randrange(1, 9))


def hostile_stream(chance: random.Random) -> bytes:
    """Return a message with right checksums and lengths around positions that mean anything."""
    size = chance.choice((1, 7, 8, 64, 1000, 65_536, 262_144))
    count = chance.choice((0, 1, size // 2, size // 2 + 1, size - 1, size, chance.randrange(size)))
    code = chance.choice(("golomb", "golomb", "golomb", "bitmap"))
    if chance.random() < 0.5:
        count = min(count, 200)
        where = np.array(sorted(chance.sample(range(size), count)), np.int64)
        block = bytearray(POSITION_CODECS[code].plan(where, size).write())
        for _ in range(chance.randrange(3) if block else 0):
            block[chance.randrange(len(block))] ^= 1 << chance.randrange(8)
    else:
        block = bytearray(chance.randbytes(chance.choice((0, 1, 2, 3, 9, 40, 200))))
        block[:1] = bytes([chance.randrange(60)])
        if chance.random() < 0.3:
            block[1:] = (chance.choice((0, 255)) for _ in block[1:])
    dtype, width = chance.choice((("float32", 4), ("int8", 1), ("bool", 0)))
    kind = [dtype, "true" if dtype == "bool" else "exact", [size]]
    row = [0, 0, "x", 0, code, count, len(block)]
    return seal([[kind], [["delta", [row]]]], bytes(block) + bytes(count * width))


def check_stranger(message: bytes) -> bool:
    """Return whether a message is refused; what is decoded instead must be within the limit."""
    try:
        payload = decode(message, max_bytes=LIMIT)
    except WireError:
        return True
    tensors = [tensor for params in payload.values() for tensor in params.values()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= LIMIT
    return False


def check_strangers(number: int, seed: int) -> int:
    """Return how many of the hostile half are refused; all of the damaged half must be."""
    chance = random.Random(seed)
    messages = [sample("none"), sample("zstd")]
    refused = 0
    for at in range(number // 2):
        assert check_stranger(strange(messages[at % 2], chance))
        refused += check_stranger(hostile_stream(chance))
    return refused


def test_strangers_messages_are_noticed_and_take_little_memory() -> None:
    tracemalloc.start()
    refused = check_strangers(2000, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 400 < refused < 900
    assert peak < 8 * LIMIT


@pytest.mark.alone
@pytest.mark.slow
def test_a_hundred_thousand_strangers_neither_crash_nor_hang_nor_pass_unnoticed() -> None:
    """Half of the messages are damaged on the way, half hostile and sealed.

    What takes a quarter of a gigabyte more than the process has ends in a MemoryError.
    """
    check_strangers(2000, seed=1)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + (1 << 28)
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        refused = check_strangers(100_000, seed=2)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert 20_000 < refused < 45_000
    assert time.process_time() - began < 60


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["float32", "exact"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=12,
)
KINDS = st.lists(
    st.tuples(
        st.sampled_from([*DTYPES, "float31"]),
        st.sampled_from(["exact", "int8", "int4", "fp8", "nf4", "float16", "x"]),
        st.lists(st.integers(-1, 9) | st.sampled_from([2**20, 2**60, 2**64]), max_size=3),
    ),
    max_size=2,
)
NUMBERS = st.integers(-1, 9) | st.sampled_from([2**31, 2**60, 2**64])
ROWS = st.lists(
    st.tuples(st.integers(-1, 2), st.integers(-1, 2), st.text(max_size=3), st.integers(-1, 2))
    | st.tuples(
        *(st.just(0), st.just(0), st.text(max_size=3), st.just(0)),
        *(st.sampled_from(["bitmap", "golomb", "x"]), NUMBERS, NUMBERS),
    ),
    max_size=3,
)


@given(
    table=JSON
    | st.tuples(JSON, JSON)
    | st.tuples(KINDS, st.lists(st.tuples(st.text(max_size=2), ROWS), max_size=3)),
    blocks=st.binary(max_size=60),
)
@settings(max_examples=150)
def test_any_table_is_refused_or_decoded_within_the_limit(table: Any, blocks: bytes) -> None:
    try:
        payload = decode(seal(table, blocks), max_bytes=LIMIT)
    except WireError:
        return
    tensors = [tensor for params in payload.values() for tensor in params.values()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= LIMIT


def kinds(*kind: Any) -> Any:
    return [[list(kind)], [["delta", [[0, 0, "x", 0]]]]]


EXACT = ["float32", "exact", [2]]


@pytest.mark.parametrize(
    ("table", "blocks", "message"),
    [
        (3, b"", r"not \[kinds, groups\]"),
        (b"[[", b"", "the table of the message is not JSON"),
        (b"[" * 200_000, b"", "the table of the message is not JSON"),
        (b"[" + b"9" * 9000 + b"]", b"", "the table of the message is not JSON"),
        (kinds("float31", "exact", [2]), b"", "unknown kind of tensor .*float31"),
        (kinds("float32", "int7", [2]), b"", "unknown kind of tensor .*int7"),
        (kinds("int64", "int8", [2]), b"", "unknown kind of tensor .*int64"),
        (kinds("float32", "exact", [-1]), b"", "unknown kind of tensor"),
        (kinds("float32", "exact", [0, 1 << 40, 1 << 40]), b"", "unknown kind of tensor"),
        (kinds("float32", "exact", [1] * 65), b"", "unknown kind of tensor"),
        (kinds("float32", "exact", [True]), b"", "unknown kind of tensor"),
        (kinds("float32", "exact", [2]), b"1234567", "the message ends inside delta/x"),
        (kinds("float32", "exact", [2]), b"123456789", "1 bytes after its last tensor"),
        (kinds("float32", "exact", [1 << 50]), b"", "the message ends inside delta/x"),
        (kinds("bool", "exact", [2]), b"\x01\x01", "unknown kind of tensor .*bool"),
        (kinds("float32", "true", [2]), b"", "unknown kind of tensor .*true"),
        (kinds("float32", "int8", [1]), b"\x00\x00\x80\xbf\x01", "delta/x is malformed: a scale"),
        ([[EXACT], [["delta", [[0, 0, "x", 1]]]]], b"", r"malformed row .* in group delta"),
        ([[EXACT], [["delta", [[1, 0, "x", 0]]]]], b"", "malformed row"),
        ([[EXACT], [["delta", [[0, 0, "x"]]]]], b"", "malformed row"),
        ([[EXACT], [["delta", []], ["delta", []]]], b"", "malformed or repeated group"),
        ([[EXACT], [[3, []]]], b"", "malformed or repeated group"),
        (
            [[EXACT], [["delta", [[0, 0, "x", 0], [1, 0, "", 0]]]]],
            bytes(16),
            "delta/x is repeated",
        ),
        (
            [[EXACT], [["delta", [[0, 0, "x", 0, "bitmap", 3, 1]]]]],
            b"",
            "delta/x has malformed positions",
        ),
        (
            [[EXACT], [["delta", [[0, 0, "x", 0, "huffman", 1, 1]]]]],
            b"",
            "delta/x has malformed positions .*huffman",
        ),
        (
            [[EXACT], [["delta", [[0, 0, "x", 0, "bitmap", 1, 1]]]]],
            b"\x20" + bytes(4),
            "delta/x is malformed: 1 bits set below or beyond 2 entries",
        ),
        (
            [[EXACT], [["delta", [[0, 0, "x", 0, "golomb", 1, 2]]]]],
            b"\x00\x20" + bytes(4),
            "delta/x is malformed: a Golomb code of position 2 of 2 entries",
        ),
    ],
)
def test_the_error_names_what_is_malformed(table: Any, blocks: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode(seal(table, blocks), max_bytes=None)


def test_a_huge_tensor_of_zeros_is_refused_before_it_is_allocated() -> None:
    table = [[["float32", "exact", [1 << 34]]], [["delta", [[0, 0, "x", 0, "golomb", 0, 0]]]]]
    tracemalloc.start()
    with pytest.raises(WireError, match=r"delta/x of shape .* beyond wire\.max_bytes, 4294967296"):
        decode(seal(table))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_limit_holds_for_all_tensors_together() -> None:
    payload = {"a": {"x": torch.zeros(100)}, "b": {"x": torch.zeros(100)}}
    assert decode(encode(payload), max_bytes=800)
    with pytest.raises(WireError, match="b/x of shape"):
        decode(encode(payload), max_bytes=799)


def test_short_names_that_unfold_to_long_ones_are_refused() -> None:
    names = [[0, 0, "x" * 100_000, 0], *([100_000 + i, 0, "y", 0] for i in range(200))]
    with pytest.raises(WireError, match="is repeated, or names are too long"):
        decode(seal([[["float32", "exact", [0]]], [["delta", names]]]))


def test_a_large_header_or_table_is_refused_unless_the_sender_is_trusted() -> None:
    noise = random.Random(0).randbytes(MAX_JSON_BYTES).hex()
    with pytest.raises(WireError, match=r"the header has \d+ bytes, allowed are"):
        decode(encode({}, {"x": noise}))
    with pytest.raises(WireError, match=r"the table has \d+ bytes, allowed are"):
        decode(encode({noise: {}}))
    large = "x" * MAX_JSON_BYTES
    with pytest.raises(WireError, match="the header of the message is longer than the 4194304"):
        decode(encode({}, {"x": large}))
    named = encode({large: {}})
    assert len(named) < 5000
    tracemalloc.start()
    with pytest.raises(WireError, match="the table of the message is longer than the 4194304"):
        decode(named)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * MAX_JSON_BYTES
    assert list(decode(named, max_bytes=None)) == [large]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"", "truncated to 0 bytes"),
        (b"PK\x03\x04" + bytes(30), "begins with b'PK.*not from fedloom"),
        (b"FDLM\x02\x00" + bytes(30), "wire version 2, this fedloom reads 1"),
        (b"FDLM\x01" + b"\xff" * 30, "begins with lengths: a length of more than 63 bits"),
        (b"FDLM\x01\x80", "begins with lengths: truncated"),
        (frame(b""), "the body of the message, 0 bytes, begins: truncated"),
        (frame(b"\x00\x01\x01"), "the body of the message is truncated to 3 bytes"),
        (seal([[], []], compression=2), "compressed in the unknown way 2"),
        (seal([[], []], b"\0" * 9), "the message has 9 bytes after its last tensor"),
        (seal([[], []], table_bytes=99), r"the table has 99 bytes, the content only \d"),
        (
            seal([[], []], compression=1, num_bytes=1 << 50),
            r"the content has \d+ bytes, wire\.max_bytes is",
        ),
        (seal([[], []], compression=1, num_bytes=99), "compressed content does not have 99"),
    ],
)
def test_a_damaged_frame_says_how(message: bytes, expected: str) -> None:
    with pytest.raises(WireError, match=expected):
        decode(message)


def test_a_header_is_an_object() -> None:
    text = deflate(b"[1]")
    head = b"FDLM\x01" + write_lengths(len(text), 0)
    with pytest.raises(WireError, match="the header of the message is a list"):
        decode(head + struct.pack("<I", zlib.crc32(text, zlib.crc32(head))) + text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"\x07", "the header of the message is not deflated: "),
        (b"", "the header of the message is not deflated: no end"),
        (deflate(b"{}")[:-1], "the header of the message is not deflated: no end"),
        (deflate(b"{}") + b"\x00", "the header of the message is not deflated: no end, or bytes"),
    ],
)
def test_what_does_not_inflate_is_refused(text: bytes, expected: str) -> None:
    head = b"FDLM\x01" + write_lengths(len(text), 0)
    with pytest.raises(WireError, match=expected):
        decode(head + struct.pack("<I", zlib.crc32(text, zlib.crc32(head))) + text)


def test_a_damaged_header_and_a_damaged_body_are_told_apart() -> None:
    message = sample()
    at = len(message) - len(split(message)[1]) - 3
    with pytest.raises(WireError, match="the header of the message does not match its checksum"):
        decode(message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :])
    with pytest.raises(WireError, match="the body of the message does not match its checksum"):
        decode(message[:-1] + bytes([message[-1] ^ 1]))


def test_bytes_that_are_no_zstd_frame_are_refused() -> None:
    content = b"\x28\xb5\x2f\xfd\x20\x08" + b"\xff" * 8
    head = bytes([1]) + write_lengths(4, 8)
    body = head + struct.pack("<I", zlib.crc32(content, zlib.crc32(head))) + content
    with pytest.raises(WireError, match="the content cannot be decompressed"):
        decode(frame(body))


def test_a_compression_bomb_is_refused_before_it_unfolds() -> None:
    bomb = seal(
        [[["uint8", "exact", [1 << 24]]], [["g", [[0, 0, "x", 0]]]]], bytes(1 << 24), compression=1
    )
    assert len(bomb) < 5000
    tracemalloc.start()
    with pytest.raises(WireError, match=r"wire\.max_bytes is 1048576"):
        decode(bomb, max_bytes=LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_task_is_no_reply() -> None:
    wire = WireSettings()
    with pytest.raises(WireError, match="header of the reply"):
        decode_reply(encode_task(Task("train", 1, "c", 2, {}, {}), settings=wire))
    with pytest.raises(WireError, match="header of the task"):
        decode_task(encode_reply(Reply("c"), settings=wire))
