"""What clients keep, on their own disk, by round: a resumed or repeated task finds what it found before."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.core.files import PART, write_atomic
from fedloom.core.protocols import ClientError, ClientId, Payload
from fedloom.wire.body import encode_pieces
from fedloom.wire.format import WireError, decode_with_header
from fedloom.wire.frame import frame_pieces

_ROUND = re.compile("0|[1-9][0-9]*")


@dataclass(frozen=True, slots=True)
class ClientStateStore:
    """One folder a client, one file a round, always lossless."""

    folder: Path
    _unsynced: set[ClientId] = field(default_factory=set, compare=False, repr=False)

    def load(self, client: ClientId, before: int) -> Payload:
        """Return the newest client state older than round `before`, empty if there is none.

        Raises:
            ClientError: where that client state is damaged; an older one would silently give other results.
        """
        older = [number for number in self._rounds(client) if number < before]
        if not older:
            return {}
        path = self._path(client, max(older))
        header, client_state = _read(path, client)
        if header != {"client": client, "round": max(older)}:
            raise ClientError(f"{path} is not the client state of {client}: it says {dict(header)}")
        return client_state

    def latest_rounds(self, before: int) -> dict[str, int]:
        """Return, by the name of each client's folder, the round of the client state that `load(client, before)` reads."""
        found = {folder.name: _rounds(folder) for folder in self._folders()}
        older = {name: [n for n in rounds if n < before] for name, rounds in found.items()}
        return {name: max(rounds) for name, rounds in older.items() if rounds}

    def check(self, rounds: Mapping[str, int]) -> None:
        """Read all that `latest_rounds` returned once.

        Raises:
            ClientError: saying what is missing or damaged.
        """
        for name, number in rounds.items():
            path = self.folder / name / str(number)
            if not path.is_file():
                raise ClientError(
                    f"the client state of {name} after round {number} is missing from {self.folder}"
                )
            header, _ = _read(path, name)
            client = str(header.get("client"))
            if header.get("round") != number or _file_name(client) != name:
                raise ClientError(
                    f"{path} is not the client state of {name}: it says {dict(header)}"
                )

    def save(self, client: ClientId, round: int, client_state: Payload) -> None:
        """Keep `client_state` as of the end of `round`; nothing is written for a client without any.

        What is there of later rounds goes: whoever asks for `round` has left their course, be it a server elsewhere that was
        resumed, whose `rewind` does not reach this disk.
        """
        known = self._rounds(client)
        for number in known:
            if number > round:
                self._path(client, number).unlink()
        if client_state or known:
            # Zeros are written too: to look for them takes longer than to write them.
            body = encode_pieces(client_state, sparse=False)
            pieces = frame_pieces(body, {"client": client, "round": round})
            write_atomic(self._path(client, round), *pieces, private=self.folder, sync=False)
            self._unsynced.add(client)

    def flush(self) -> None:
        """See that all that was saved is on the disk: once for many clients, whose files are small."""
        if self._unsynced:
            os.sync()
            self._unsynced.clear()

    def prune(self, below: int) -> None:
        """Drop what `load(client, before)` no longer returns for any `before >= below`."""
        for folder in self._folders():
            files = _files(folder)
            leftovers = [name for name in files if name.endswith(PART)]
            older = [number for number in _numbers(files) if number < below][:-1]
            for name in [*leftovers, *map(str, older)]:
                (folder / name).unlink()

    def rewind(self, to: int) -> None:
        """Drop what was kept after round `to`: a resumed run may take another course from there."""
        for folder in self._folders():
            for number in _rounds(folder):
                if number > to:
                    (folder / str(number)).unlink()

    def _folders(self) -> list[Path]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if path.is_dir())

    def _path(self, client: ClientId, round: int) -> Path:
        return self.folder / _file_name(client) / str(round)

    def _rounds(self, client: ClientId) -> list[int]:
        return _rounds(self.folder / _file_name(client))


def _read(path: Path, client: str) -> tuple[Mapping[str, Any], Payload]:
    try:
        return decode_with_header(path.read_bytes(), max_bytes=None)
    except (WireError, OSError) as error:
        raise ClientError(
            f"the client state of {client} cannot be read from {path}: {error}"
        ) from error


def _rounds(folder: Path) -> list[int]:
    """Return the rounds there are files of; whatever else lies there is left alone."""
    return _numbers(_files(folder))


def _numbers(files: Iterable[str]) -> list[int]:
    return sorted(int(name) for name in files if _ROUND.fullmatch(name))


def _files(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as found:
            return [entry.name for entry in found if entry.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _file_name(client: ClientId) -> str:
    """Return a name that is safe on every file system and differs from client to client."""
    if re.fullmatch(r"[a-z0-9_][a-z0-9_-]{0,63}", client):
        return client
    digest = hashlib.blake2b(client.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return f"{re.sub('[^a-z0-9_-]', '_', client.lower())[:40]}.{digest}"
