"""Lengths and JSON in few bytes: they come back, and nothing else does."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.protocols import Reply
from fedloom.wire.compact import (
    deflate,
    inflate,
    read_lengths,
    write_json,
    write_lengths,
)
from fedloom.wire.format import decode, encode_reply
from fedloom.wire.wire_settings import WireSettings


@given(st.lists(st.integers(0, 2**63 - 1), max_size=4), st.binary(max_size=3))
def test_lengths_come_back_and_say_where_they_end(lengths: list[int], after: bytes) -> None:
    written = write_lengths(*lengths)
    found = read_lengths(memoryview(written + after), 0, len(lengths))
    assert found == (lengths, len(written))


@pytest.mark.parametrize(
    ("length", "num_bytes"), [(0, 1), (127, 1), (128, 2), (16_384, 3), (2**63 - 1, 9)]
)
def test_a_length_takes_a_byte_for_seven_bits(length: int, num_bytes: int) -> None:
    assert len(write_lengths(length)) == num_bytes


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x01\x80"])
def test_lengths_that_end_early_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="truncated"):
        read_lengths(memoryview(data), 0, 2)


def test_a_length_beyond_63_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 63 bits"):
        read_lengths(memoryview(b"\xff" * 9 + b"\x01"), 0, 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=9,
)


@given(JSON)
def test_json_comes_back_and_is_never_much_longer(value: Any) -> None:
    text = json.dumps(value, separators=(",", ":")).encode()
    written = write_json(value)
    assert json.loads(inflate(memoryview(written), len(text))) == value
    assert len(written) <= len(text) + 6


def test_a_text_longer_than_its_limit_is_refused_before_it_unfolds() -> None:
    bomb = memoryview(deflate(bytes(1 << 20)))
    assert len(bomb) < 2000
    assert inflate(bomb, 1 << 20) == inflate(bomb, None) == bytes(1 << 20)
    with pytest.raises(ValueError, match="longer than the 1048575 bytes"):
        inflate(bomb, (1 << 20) - 1)


def test_a_message_that_says_nothing_takes_32_bytes() -> None:
    message = encode_reply(Reply("client-007"), settings=WireSettings())
    assert len(message) <= 32
    assert decode(message) == {}


def test_the_words_of_version_1_do_not_change() -> None:
    """A client that holds other words would read other text: new words, new version."""
    from fedloom.wire import compact, frame

    words = vars(compact)["_WORDS"]
    known = hashlib.sha256(words).hexdigest()[:16]
    assert (frame.VERSION, known) == (1, "855f0b9bfd889338")
