"""The worker that stays at a site while Flower's processes come and go: it keeps the model, and answers envelopes."""

import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedloom.engines.flower import pipe

Answer = Callable[[dict[str, Any], list[bytes]], tuple[dict[str, Any], list[bytes]]]
"""Envelope in, envelope out."""


def serve(path: Path, answer: Answer) -> None:
    """Answer envelopes one by one, without end."""
    with pipe.listen(path) as door:
        while True:
            caller, _ = door.accept()
            with caller:
                _answer(caller, answer)


def _answer(caller: socket.socket, answer: Answer) -> None:
    try:
        header, pieces = pipe.receive(caller)
    except (OSError, ValueError):
        return
    try:
        said = answer(header, pieces)
    except Exception as error:  # noqa: BLE001 whatever one envelope does, the next one is answered
        traceback.print_exc()
        said = {"refusal": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}, []
    try:
        pipe.send(caller, *said)
    except OSError as error:
        sys.stderr.write(f"nobody waits for this answer any more: {error}\n")
