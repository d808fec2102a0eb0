"""The site's side: a resident worker, a SuperNode beside it, and a word on what happens, until the run has ended."""

import re
import socket
import ssl
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from fedloom.deploy.beside import resident, supernode
from fedloom.deploy.site_settings import ENDED, SiteSettings
from fedloom.engines.flower.keys import check_dates
from fedloom.engines.flower.processes import Program

_UNKNOWN = (
    "the server at {server} does not take the key in {keys}: it does not know it (`fedloom keys add {name}`"
    " there makes one, read when `fedloom serve` starts), or the key was in use a minute ago"
)
_OTHER_AUTHORITY = (
    "the server at {server} does not show a certificate of {keys}/ca.crt ({error}): copy the site's folder"
    " from the server's keys again; `fedloom keys init --host` there names what sites connect to"
)
_EXPIRED = (
    "the certificate of the server at {server} is not valid now ({error}): `fedloom keys renew` there makes a new one,"
    " and this site keeps its folder; or one of the two clocks is wrong"
)
_DATES = (9, 10)
"""OpenSSL's codes: not yet valid, expired."""
_NOBODY = (
    "nobody answers at {server} ({error}): is `fedloom serve` running there, and its port open?"
)
_LAST = 3.0
"""Seconds in which the answer to the server's goodbye gets out."""
_TRIES = 100.0
"""Seconds: as long as a SuperLink holds a node that was killed for alive, and so refuses its key."""


@dataclass
class Visit:
    """One site at one server."""

    settings: SiteSettings
    server: str
    keys: Path
    console: Console
    _at: int = 0
    """How much of the worker's log is shown."""
    _met: bool = False
    _last: str = ""
    _hopeless: str = ""
    _began: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Take part until the server says that the run has ended.

        Raises:
            ValueError: where the server cannot be joined; the message says what to do.
        """
        for name in ("ca.crt", "node.key"):
            if not (self.keys / name).is_file():
                raise ValueError(
                    f"{self.keys / name} does not exist: --keys is the folder that `fedloom keys add"
                    f" {self.settings.name}` made at the server"
                )
        check_dates(
            self.keys / "ca.crt", "the server makes new keys, and hands this site its folder again"
        )
        self._reach()
        folder = self.settings.folder
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedloom-")))
            logs = folder / "logs"
            log = logs / self.settings.name / "worker.log"
            self._at = log.stat().st_size if log.exists() else 0
            socket = stack.enter_context(
                resident(self.settings, private / "worker", logs, self.console)
            )
            keeper = stack.enter_context(supernode(logs, self.server, self.keys, socket))
            keeper.on_restart = self._ended
            self._say(f"waiting for {self.server}")
            while not self._heard(log):
                if self._hopeless:
                    raise ValueError(self._hopeless)
                time.sleep(0.3)
            time.sleep(_LAST)

    def _heard(self, log: Path) -> bool:
        """Show what the worker said since the last look; return whether the run has ended."""
        with open(log, "rb") as file:
            file.seek(self._at)
            whole = file.read().rpartition(b"\n")
        self._at += len(whole[0]) + len(whole[1])
        ended = False
        for line in whole[0].decode(errors="replace").splitlines():
            kind, _, words = line.partition("\t")
            if kind == "site":
                self._say(words)
                self._met, ended = True, ended or words == ENDED
        return ended

    def _say(self, words: str) -> None:
        line = f"{self.settings.name}: {words}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _reach(self) -> None:
        """Wait until somebody with the right certificate answers, without sending anything."""
        context = ssl.create_default_context(cafile=str(self.keys / "ca.crt"))
        host, _, port = self.server.rpartition(":")
        is_reported = False
        while True:
            try:
                with socket.create_connection((host, int(port)), timeout=20) as wire:
                    context.wrap_socket(wire, server_hostname=host).close()
                return
            except ssl.SSLCertVerificationError as error:
                if error.verify_code in _DATES:
                    raise ValueError(self._filled(_EXPIRED, error.verify_message)) from error
                raise ValueError(self._filled(_OTHER_AUTHORITY, error.verify_message)) from error
            except OSError as error:
                if not is_reported:
                    self._say(self._filled(_NOBODY, str(error)))
                is_reported = True
                time.sleep(2)

    def _filled(self, words: str, error: str) -> str:
        name = self.settings.name
        return words.format(server=self.server, keys=self.keys, name=name, error=error)

    def _ended(self, program: Program) -> None:
        unknown = re.search("Failed to activate|401|Unauthori[sz]ed", program.last_words(12))
        message = f"the SuperNode ended and is started again: {program.last_words(1)}"
        if unknown:
            message = self._filled(_UNKNOWN, "")
        # A server that was started again knows nothing of who was there: then trying again is right.
        if unknown and not self._met and time.monotonic() - self._began >= _TRIES:
            self._hopeless = message
        elif message != self._last:
            self._last = message
            self._say(message)
