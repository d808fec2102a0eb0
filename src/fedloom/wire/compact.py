"""Lengths and JSON in few bytes: most of a short message would be its description.

A length is base 128, lowest digits first, the high bit set on all bytes but the last. JSON is deflated (RFC 1951)
against `_WORDS`, which both sides hold, so that what most messages say costs nothing but a reference.
"""

import json
import zlib
from typing import Any

_MAX_LENGTH_BYTES = 9
_WORDS = b"".join(
    (
        b'"golomb","bitmap",bfloat16float16int32int16int8int4[["bool","true",[',
        b"base_model.model.model.layers.0.mlp.gate_proj.up_proj.down_proj.lora_magnitude_vector.weight",
        b'embed_tokenslm_headinput_layernorm.self_attn.o_proj.k_proj.q_proj.lora_A.weight",0],[v_proj',
        b'{"trees":{"type":"fields":{"dict":[["tuple":["list":["bytes":"tensor":"',
        b'{"kind":"validate","test","profile":{"language":"tier":"',
        b'"personal/num_tokens":.0,"personal/skipped_steps":0.0,"personal/loss":',
        b'[[["float32","exact",[8,64]],["float32","exact",[64,8]]],[["control_delta",[["mask",[["clip":',
        b'[[["float32","exact",[4096]]],[["params",[[0,0,"coefficients",0]]]]]',
        b'[[["float32","exact",[1024]],["uint8","exact",[250]]],[["params",[[0,0,"coefficients",0]]],',
        b'["walk",[[12,0,"",1]]]]]["int64","exact",[]]],["walk",[[0,0,"seed",1]]]]]',
        b'[[["float64","exact",[4096]]],[["delta",[[0,0,"coefficients",0]]]]]',
        b'[[["float32","exact",[200]],["float64","exact",[]]],[["scalars",',
        b'[[0,0,"coefficients",0],[0,0,"lr",1]]]]]',
        b'[[["float32","exact",[1]]],[["moves",[[0,0,"coefficients",0]]]]]',
        b'[[["uint8","exact",[25]]],[["votes",[[0,0,"coefficients",0]]]]]',
        b'{"kind":"train","round":1,"client":"client-000","seed":"","profile":{"num_examples":"1"}}',
        b',"metrics":{"num_tokens":1.0,"skipped_steps":0.0,"loss":2.',
        b'{"client":"client-000","weight":1.0,"metrics":{}}',
    )
)
"""Part of the format: a change needs a new version of it. The likeliest stands last."""


def write_lengths(*lengths: int) -> bytes:
    """Return the lengths one after another."""
    out = bytearray()
    for length in lengths:
        last = max(length.bit_length() - 1, 0) // 7
        out += bytes(length >> 7 * at & 127 | (128 if at < last else 0) for at in range(last + 1))
    return bytes(out)


def read_lengths(data: memoryview, start: int, count: int) -> tuple[list[int], int]:
    """Return `count` lengths from `start` on, and where they end.

    Raises:
        ValueError: where the data end before, or a length has more than 63 bits.
    """
    lengths, at = [], start
    for _ in range(count):
        length, shift = 0, 0
        while True:
            if at >= len(data):
                raise ValueError("truncated")
            if shift >= 7 * _MAX_LENGTH_BYTES:
                raise ValueError("a length of more than 63 bits")
            length |= (data[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if data[at - 1] < 128:
                break
        lengths.append(length)
    return lengths, at


def write_json(value: Any) -> bytes:
    """Return a value as deflated JSON."""
    return deflate(json.dumps(value, separators=(",", ":")).encode())


def deflate(text: bytes) -> bytes:
    """Return a text against the words that both sides hold."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=_WORDS)
    return squeeze.compress(text) + squeeze.flush()


def inflate(data: memoryview, limit: int | None) -> bytes:
    """Return the text, of at most `limit` bytes; None trusts the sender.

    Raises:
        ValueError: where it is longer, or the data are not one text and nothing after it.
    """
    stretch = zlib.decompressobj(-15, zdict=_WORDS)
    try:
        text = stretch.decompress(data, 0 if limit is None else limit + 1)
    except zlib.error as error:
        raise ValueError(f"not deflated: {error}") from None
    if limit is not None and len(text) > limit:
        raise ValueError(f"longer than the {limit} bytes that are allowed")
    if not stretch.eof or stretch.unused_data:
        raise ValueError("not deflated: no end, or bytes after it")
    return text
