"""Envelopes between two processes of one machine, over a socket that only their user can open; and a worker that answers them."""

import json
import os
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_HEAD, _SIZE = struct.Struct("<II"), struct.Struct("<Q")
_MAX_JSON, _MAX_PIECES = 1 << 26, 1 << 20


Piece = bytes | memoryview


def send(pipe: socket.socket, header: Mapping[str, Any], pieces: Sequence[Piece] = ()) -> None:
    """Write one envelope."""
    text = json.dumps(dict(header)).encode()
    sizes = b"".join(_SIZE.pack(len(piece)) for piece in pieces)
    pipe.sendall(_HEAD.pack(len(text), len(pieces)) + sizes + text)
    for piece in pieces:
        pipe.sendall(piece)


def receive(pipe: socket.socket) -> tuple[dict[str, Any], list[bytes]]:
    """Read one envelope.

    Raises:
        ConnectionError: where the other side is gone, or is not one of ours.
    """
    text_bytes, number = _HEAD.unpack(_read(pipe, _HEAD.size))
    if text_bytes > _MAX_JSON or number > _MAX_PIECES:
        raise ConnectionError(
            f"an envelope announces {text_bytes} bytes of header, {number} pieces"
        )
    sizes = [_SIZE.unpack(_read(pipe, _SIZE.size))[0] for _ in range(number)]
    header = json.loads(_read(pipe, text_bytes))
    return header, [_read(pipe, size) for size in sizes]


def listen(path: Path) -> socket.socket:
    """Return a listening socket at `path`, which its owner alone may open."""
    path.unlink(missing_ok=True)
    pipe = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        pipe.bind(str(path))
    finally:
        os.umask(before)
    pipe.listen()
    return pipe


def _read(pipe: socket.socket, size: int) -> bytes:
    data, at = bytearray(size), 0
    view = memoryview(data)
    while at < size:
        count = pipe.recv_into(view[at:], min(size - at, 1 << 20))
        if not count:
            raise ConnectionError("the other side is gone")
        at += count
    return bytes(data)


Answer = Callable[[dict[str, Any], list[bytes]], tuple[dict[str, Any], Sequence[Piece]]]
"""Envelope in, envelope out."""


def serve(path: Path, answer: Answer) -> None:
    """Answer envelopes one by one, without end."""
    with listen(path) as door:
        while True:
            caller, _ = door.accept()
            with caller:
                _answer(caller, answer)


def _answer(caller: socket.socket, answer: Answer) -> None:
    try:
        header, pieces = receive(caller)
    except (OSError, ValueError):
        return
    try:
        reply = answer(header, pieces)
    except Exception as error:  # noqa: BLE001 whatever one envelope does, the next one is answered
        traceback.print_exc()
        reply = {"refusal": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}, ()
    try:
        send(caller, *reply)
    except OSError as error:
        sys.stderr.write(f"nobody waits for this answer any more: {error}\n")
