"""A folder that the server hands to each site before round 1, piece by piece: what a site has of a model it may not have.

The server's greeting lists the files with their lengths and hashes. A site asks for what it lacks, each file from the byte at
which it was cut off, and gets as many pieces as one message holds; nothing is read before it is whole and has the hash.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.core.files import PART

PIECE = 16 << 20
"""Bytes of files in one message."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.(safetensors|json|jinja|txt|model)")
"""Weights without code, and texts."""


@dataclass(frozen=True)
class Shelf:
    """A folder at the server."""

    folder: Path

    def listed(self) -> dict[str, list[Any]]:
        """Return the length and the SHA-256 of every file, by its name."""
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return {path.name: [path.stat().st_size, _sha256(path)] for path in files}

    def pieces(self, wanted: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Return what a site asks for next, in that order: of as many files as there is room for in a message.

        Raises:
            ValueError: where it asks for what is not here.
        """
        known, left = {path.name for path in self.folder.iterdir()}, PIECE
        found = list[bytes]()
        for each in wanted:
            name, at = each.get("file"), each.get("at")
            if type(at) is not int or at < 0 or name not in known:
                raise ValueError(
                    "it asks for a file that is not handed over: install the same fedloom"
                )
            with open(self.folder / str(name), "rb") as file:
                file.seek(at)
                found.append(file.read(left))
            left -= len(found[-1])
            if not left:
                break
        return found


def lacking(folder: Path, listed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a site asks for next: files, and each from which byte; none where all are here.

    Raises:
        ValueError: where the list names files that no site takes.
    """
    wanted = list[dict[str, Any]]()
    for name, (size, sha256) in _checked(listed).items():
        file, part = folder / name, folder / f"{name}{PART}"
        if file.is_file() and file.stat().st_size == size and _sha256(file) == sha256:
            continue
        at = part.stat().st_size if part.is_file() else 0
        if at > size:
            part.unlink()
            at = 0
        wanted.append({"file": name, "at": at})
    return wanted


def take(folder: Path, listed: Mapping[str, Any], wanted: Mapping[str, Any], piece: bytes) -> None:
    """Add a piece to a file; one that is whole gets its name once its hash is right.

    Raises:
        ValueError: where it is not what was asked for, or the whole has another hash.
    """
    name = wanted["file"]
    size, sha256 = _checked(listed)[name]
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}{PART}"
    begun = part.stat().st_size if part.is_file() else 0
    if begun != wanted["at"] or begun + len(piece) > size or (not piece and begun < size):
        raise ValueError(f"{name} came in pieces that do not fit: start `fedloom join` again")
    with open(part, "ab") as file:
        file.write(piece)
    if begun + len(piece) < size:
        return
    if _sha256(part) != sha256:
        part.unlink()
        raise ValueError(f"{name} did not arrive as the server has it: start `fedloom join` again")
    part.replace(folder / name)


def _checked(listed: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    found = {}
    for name, held in listed.items():
        if not _NAME.fullmatch(name) or len(held) != 2 or type(held[0]) is not int:
            raise ValueError(
                f"this site takes weights as safetensors and texts, no file called {name[:60]!a}"
            )
        found[name] = (held[0], str(held[1]))
    return found


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
