"""Where sites come in, and what a server tells of them while it runs."""

import ipaddress
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.core.files import write_atomic
from fedloom.engines.requests import Site

if TYPE_CHECKING:
    from fedloom.engines.remote import SiteRecord


@dataclass(frozen=True, slots=True)
class Listening:
    """An address, and the folder of keys."""

    host: str
    port: int
    keys: Path

    def write(self, folder: Path) -> None:
        """Remember it, so that a resumed run listens at the same place."""
        fields = {"host": self.host, "port": self.port, "keys": str(self.keys.resolve())}
        write_atomic(folder / "listen.json", json.dumps(fields).encode())

    @classmethod
    def read(cls, folder: Path) -> "Listening | None":
        """Return what `write` wrote, if anything."""
        file = folder / "listen.json"
        if not file.exists():
            return None
        fields = json.loads(file.read_text())
        return cls(fields["host"], fields["port"], Path(fields["keys"]))


def address(text: str, *, local_only: bool = False, any_port: bool = False) -> tuple[str, int]:
    """Read HOST:PORT.

    Args:
        text: What was given.
        local_only: Whether a host that others can reach is refused.
        any_port: Whether port 0 stands for a free one.

    Raises:
        ValueError: where it is none, or not allowed.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if (
        not colon
        or not host
        or not port.isdecimal()
        or not (any_port or int(port))
        or int(port) > 65535
    ):
        raise ValueError(f"an address must look like HOST:PORT, got {text!r}")
    if local_only and not is_loopback(host):
        raise ValueError(
            f"{host} can be reached from other machines: say so with --public, or listen on 127.0.0.1"
        )
    return host, int(port)


def check_free(host: str, port: int) -> None:
    """Refuse an address that another program listens at: sites would talk to it.

    Raises:
        ValueError: saying why nobody can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((host, port))
            door.listen()
        except OSError as error:
            raise ValueError(
                f"--listen {host}:{port} cannot be listened at ({error.strerror or error}): end the program that"
                " does, or take another port"
            ) from error


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def write_status(
    folder: Path, round: int, records: "Mapping[Site, SiteRecord]", connected: Mapping[Site, str]
) -> None:
    """Write what `fedloom status` shows."""
    sites: dict[str, Any] = {
        site: {**asdict(record), "connected": site in connected} for site, record in records.items()
    }
    fields = {
        "pid": os.getpid(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "round": round,
        "sites": sites,
    }
    write_atomic(folder / "status.json", json.dumps(fields, indent=2).encode())
