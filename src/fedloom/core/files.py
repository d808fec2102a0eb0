"""Files that are either whole or absent, whatever is killed and whenever."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from pathlib import Path

PART = ".part"
"""Ends the name of a file that is being written; a leftover means a killed process."""


class DiskFull(OSError):
    """No room for a file; what was there before is intact."""


class DamagedFile(ValueError):
    """A file that is not what was written."""


def private_folder(folder: Path) -> None:
    """Make a folder, with those above it, that only its owner can enter; close one that is there already."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        # Of somebody else's, or on a file system without modes: the files in it have their own.
        with contextlib.suppress(PermissionError):
            folder.chmod(0o700)


def write_atomic(path: Path, *pieces: bytes, private: Path | None = None) -> None:
    """Replace `path` by the joined pieces, on the disk when this returns.

    Args:
        path: Made with its folders.
        pieces: What the file holds.
        private: A folder above the file that only its owner may enter, nor read the file.

    Raises:
        DiskFull: where they do not fit.
    """
    part = path.with_name(path.name + PART)
    try:
        if private:
            private_folder(private)
            part.unlink(missing_ok=True)  # one that is there would keep its mode
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb", opener=_opened_by_owner if private else None) as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        there = next(folder for folder in path.parents if folder.exists())
        num_bytes, free = sum(map(len, pieces)), shutil.disk_usage(there).free
        raise DiskFull(
            f"writing {path} needs {num_bytes} bytes and {free} are free: make room there, or "
            "write elsewhere"
        ) from error
    _sync_folder(path.parent)


def write_hashed(path: Path, data: bytes, *, private: Path | None = None) -> None:
    """Write `data` as `write_atomic` does, with a line before it that holds its SHA-256."""
    head = hashlib.sha256(data).hexdigest().encode() + b"\n"
    write_atomic(path, head, data, private=private)


def read_hashed(path: Path) -> bytes:
    """Return what `write_hashed` was given.

    Raises:
        DamagedFile: where the file holds anything else.
    """
    stored, _, data = path.read_bytes().partition(b"\n")
    if stored != hashlib.sha256(data).hexdigest().encode():
        raise DamagedFile(f"{path} does not match its SHA-256")
    return data


def _opened_by_owner(path: str, flags: int) -> int:
    # The mode is the file's from the start: nobody reads a key between two calls.
    return os.open(path, flags, 0o600)


def _sync_folder(folder: Path) -> None:
    # The name lives in the folder: without this, a power failure may bring the older file back.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
