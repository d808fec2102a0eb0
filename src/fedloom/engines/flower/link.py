"""Our end of the relay: starts SuperLink and run, and carries envelopes through them; a new link replaces one that died."""

import contextlib
import socket
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.engines.flower import pipe
from fedloom.engines.flower.processes import Program
from fedloom.engines.flower.programs import FlowerError, SuperLink
from fedloom.engines.requests import Envelope, Retryable, Site, Ticket, TransportDown

_NODE_UNAVAILABLE = 5
_REASONS = {
    _NODE_UNAVAILABLE: "its SuperNode is gone in the middle of the work",
    2: "its Flower app failed: {}",
    3: "no answer for a long time; look at the site's worker.log, or raise engine.flower.deadline",
    8: "its Flower app was killed in the middle of the work",
}
_LIVELY = 120.0
"""Seconds a request to the relay may take before it counts as dead."""


@dataclass
class Link:
    """A Transport over Flower."""

    superlink: SuperLink
    _program: Program | None = None
    _relay: socket.socket | None = None
    _names: Mapping[str, Site] = field(default_factory=dict)
    _temporary: Path | None = None

    def open(self) -> None:
        """Start the SuperLink and the run, and wait for its server half."""
        # A socket's path may have some hundred characters: not below the run's folder.
        self._temporary = Path(tempfile.mkdtemp(prefix="fedloom-"))
        with pipe.listen(self._temporary / "server") as door:
            self._program = self.superlink.start()
            self._names = self.superlink.register()
            self.superlink.submit(self._temporary / "server")
            door.settimeout(_LIVELY)
            try:
                self._relay, _ = door.accept()
            except TimeoutError as error:
                raise FlowerError(
                    f"the run's server half did not start: {self._program.last_words()}"
                ) from error
        self._relay.settimeout(_LIVELY)

    def close(self) -> None:
        """End the run and the SuperLink."""
        if self._relay:
            self._relay.close()
            self._relay = None
        if self._program:
            self._program.stop()
            self._program = None
        if self._temporary:
            (self._temporary / "server").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._temporary.rmdir()

    def reopen(self) -> None:
        self.close()
        self.open()

    def sites(self) -> Mapping[Site, str]:
        nodes, _ = self._ask({"do": "nodes"})
        return {
            self._names[node]: f"{node} {since}"
            for node, since in nodes["nodes"].items()
            if node in self._names
        }

    def send(self, envelopes: Mapping[Site, Envelope], *, seconds: float) -> Mapping[Site, Ticket]:
        nodes = {site: node for node, site in self._names.items()}
        pieces: list[pipe.Piece] = []
        at: dict[int, int] = {}
        packed = []
        for site, envelope in envelopes.items():
            for piece in envelope.pieces:
                if id(piece) not in at:
                    at[id(piece)] = len(pieces)
                    pieces.append(piece)
            where = [at[id(piece)] for piece in envelope.pieces]
            packed.append({"node": nodes[site], "header": dict(envelope.header), "pieces": where})
        header, _ = self._ask({"do": "send", "envelopes": packed, "seconds": seconds}, pieces)
        if len(header["ids"]) != len(envelopes):
            raise TransportDown("the SuperLink took no message")
        return {site: str(ticket) for site, ticket in zip(envelopes, header["ids"], strict=True)}

    def collect(self, tickets: Collection[Ticket]) -> Mapping[Ticket, Envelope | str]:
        if not tickets:
            return {}
        header, pieces = self._ask({"do": "collect", "ids": list(tickets)})
        out: dict[Ticket, Envelope | str] = {}
        for answer in header["answers"]:
            if "error" in answer:
                code, reason = answer["error"]
                words = _REASONS.get(code, f"Flower's error {code}: {{}}")
                why = words.format(" ".join(reason.split())[:300])
                out[answer["id"]] = Retryable(why) if code == _NODE_UNAVAILABLE else why
            else:
                number = answer["pieces"]
                out[answer["id"]] = Envelope(answer["header"], pieces[:number])
                pieces = pieces[number:]
        return out

    def _ask(
        self, header: Mapping[str, Any], pieces: Collection[pipe.Piece] = ()
    ) -> tuple[dict[str, Any], list[bytes]]:
        if not self._relay:
            raise TransportDown("the link is closed")
        try:
            pipe.send(self._relay, header, list(pieces))
            return pipe.receive(self._relay)
        except OSError as error:
            raise TransportDown(f"the SuperLink or its run is gone ({error})") from error
