"""What Flower runs for us, on the server and at each site: both only hand envelopes on to our own processes."""

import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Any, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedloom.engines.flower import pipe

CHUNK = 4 << 20
"""Bytes of one array: each is one request, however large the message."""
WORKER = "FEDLOOM_WORKER"
"""Environment of a SuperNode: the socket of the site's resident worker."""
PATIENCE = 60.0
"""Seconds a worker has to start listening."""
_KIND = "fedloom.chunk/1"

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def relay(grid: Grid, context: Context) -> None:
    """Do what the process that started the run asks for, until it hangs up."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(str(context.run_config["socket"]))
        while True:
            try:
                header, pieces = pipe.receive(server)
            except ConnectionError:
                return
            pipe.send(server, *_serve(grid, header, pieces))


@client_app.train()
def forward(message: Message, _: Context) -> Message:
    """Hand an envelope to the resident worker and its answer back."""
    header, pieces = _opened(message.content)
    try:
        with _connected(os.environ[WORKER]) as worker:
            pipe.send(worker, header, pieces)
            header, pieces = pipe.receive(worker)
    except OSError as error:
        header, pieces = {"refusal": f"its worker died and is started again ({error})"}, []
    return Message(_packed(header, pieces), reply_to=message)


def _connected(path: str) -> socket.socket:
    """Return a connection to the worker; one that is just being started is waited for."""
    end = time.monotonic() + PATIENCE
    while True:
        worker = socket.socket(socket.AF_UNIX)
        try:
            worker.connect(path)
        except OSError:
            worker.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
        else:
            return worker


def _serve(
    grid: Grid, header: dict[str, Any], pieces: list[bytes]
) -> tuple[dict[str, Any], list[bytes]]:
    match header["do"]:
        case "nodes":
            # Not in the public Grid, but the only way to see that a node was started again.
            nodes = cast(Any, grid).get_nodes()
            return {"nodes": {str(n.node_id): str(n.last_activated_at) for n in nodes}}, []
        case "send":
            return {"ids": _push(grid, header, pieces)}, []
        case "collect":
            return _pull(grid, header["ids"])
    raise ValueError(f"unknown request {header['do']!r}")


def _push(grid: Grid, header: dict[str, Any], pieces: list[bytes]) -> list[str | None]:
    messages = [
        Message(
            _packed(envelope["header"], [pieces[i] for i in envelope["pieces"]]),
            int(envelope["node"]),
            "train",
            ttl=float(header["seconds"]),
        )
        for envelope in header["envelopes"]
    ]
    return list(grid.push_messages(messages))


def _pull(grid: Grid, ids: Sequence[str]) -> tuple[dict[str, Any], list[bytes]]:
    answers: list[dict[str, Any]] = []
    out: list[bytes] = []
    for message in grid.pull_messages(list(ids)):
        # An error that the SuperLink makes carries its own node: only this id says whose it is.
        answer: dict[str, Any] = {"id": message.metadata.reply_to_message_id}
        if message.has_error():
            answer["error"] = [message.error.code, str(message.error.reason)]
        else:
            header, pieces = _opened_of_site(message)
            answer |= {"header": header, "pieces": len(pieces)}
            out += pieces
        answers.append(answer)
    return {"answers": answers}, out


def _opened_of_site(message: Message) -> tuple[dict[str, Any], list[bytes]]:
    """Return a site's envelope; one that is none of ours is a refusal of that site, and ends nobody else's round."""
    try:
        return _opened(message.content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        return {"refusal": f"its answer is no envelope of fedloom's: {reason}"}, []


def _packed(header: dict[str, Any], pieces: Sequence[bytes]) -> RecordDict:
    chunks = {
        f"{i:06d}.{at:012d}": Array("uint8", (len(chunk),), _KIND, chunk)
        for i, piece in enumerate(pieces)
        for at in range(0, len(piece), CHUNK)
        if (chunk := piece[at : at + CHUNK])
    }
    text = json.dumps({"header": header, "sizes": [len(piece) for piece in pieces]})
    return RecordDict({"envelope": ConfigRecord({"text": text}), "chunks": ArrayRecord(chunks)})


def _opened(content: RecordDict) -> tuple[dict[str, Any], list[bytes]]:
    envelope = json.loads(str(content["envelope"]["text"]))
    header, sizes = envelope["header"], envelope["sizes"]
    if not isinstance(header, dict) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("an envelope without a header, or of pieces without a length")
    chunks = content["chunks"]
    pieces = []
    for i, size in enumerate(sizes):
        # One after another: a size that is a lie ends at the first chunk that is missing.
        starts = range(0, size, CHUNK)
        parts = (cast(Array, chunks[f"{i:06d}.{at:012d}"]).data for at in starts)
        pieces.append(b"".join(parts))
        if len(pieces[-1]) != size:
            raise ValueError(f"piece {i} of an envelope has {len(pieces[-1])} bytes, not {size}")
    return header, pieces
