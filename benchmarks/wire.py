"""A wire of one's own between sites and their server: its bytes are counted, and it can be cut."""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field

OUTAGE = 10.0
"""Seconds for which the link is gone."""


@dataclass
class Wire:
    """Stands between the sites and the server, counts, and can be cut."""

    target: int
    up: int = 0
    down: int = 0
    is_cut: bool = False
    door: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    open_now: set[socket.socket] = field(default_factory=set)

    def start(self) -> int:
        """Return the port that sites connect to."""
        threading.Thread(target=self._accept, daemon=True).start()
        return int(self.door.getsockname()[1])

    def cut(self) -> None:
        """Break all connections, and let none through for a while."""
        self.is_cut = True
        for end in list(self.open_now):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        time.sleep(OUTAGE)
        self.is_cut = False

    def _accept(self) -> None:
        while True:
            try:
                site, _ = self.door.accept()
            except OSError:
                return
            try:
                if self.is_cut:
                    raise ConnectionError
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                site.close()
                continue
            self.open_now |= {site, server}
            for pair in ((site, server, "up"), (server, site, "down")):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(1 << 18):
                self.up += len(data) if way == "up" else 0
                self.down += len(data) if way == "down" else 0
                target.sendall(data)
        self.open_now -= {source, target}
