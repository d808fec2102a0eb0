"""Files that are either whole or absent, whatever is killed and whenever; and where one may be written, asked before the work."""

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


def write_atomic(
    path: Path, *pieces: bytes | memoryview, private: Path | None = None, sync: bool = True
) -> None:
    """Replace `path` by the joined pieces.

    Args:
        path: Made with its folders.
        pieces: What the file holds.
        private: A folder above the file that only its owner may enter, nor read the file.
        sync: Whether it is on the disk when this returns; without, a kill leaves it whole or absent all the same, and
            whoever writes many files sees to the disk once, by `os.sync`.

    Raises:
        DiskFull: where they do not fit.
    """
    part = path.with_name(path.name + PART)
    try:
        if private:
            if not private.is_dir():
                private.mkdir(mode=0o700, parents=True, exist_ok=True)
            _close(private, 0o700)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb", opener=_private_opener if private else None) as file:
            if private:
                # A file that somebody left keeps its mode.
                _close(file.fileno(), 0o600)
            for piece in pieces:
                file.write(piece)
            if sync:
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
    if sync:
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


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _close(what: Path | int, mode: int) -> None:
    """Take from others what a folder, or a file that is still empty, allows them."""
    if stat.S_IMODE(os.stat(what).st_mode) != mode:
        # Some file systems have no modes, and somebody else's folder keeps its own.
        with contextlib.suppress(PermissionError):
            os.chmod(what, mode)


def _sync_folder(folder: Path) -> None:
    # The name lives in the folder: without this, a power failure may bring the older file back.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_name(name: str) -> str:
    """Return a run's name as the name of a file or folder of its own."""
    return name.replace("/", "-").replace("\\", "-")


def folder_at(path: Path, what: str) -> Path:
    """Return a path that is, or can become, a folder; `what` names the setting that gives it.

    Raises:
        ValueError: where it or a part of it is a file.
    """
    there = next((at for at in (path, *path.parents) if at.exists() or at.is_symlink()), path)
    if there.exists() and not there.is_dir():
        raise ValueError(f"{what} must be a folder, got {path}, where {there} is a file")
    return path


def file_at(path: Path, what: str, *, ends: tuple[str, ...] = ()) -> Path:
    """Return a path that can become a file in a folder that is there; `ends` are what its name may end in.

    Raises:
        ValueError: where it is a folder, its folder is not there, or its name ends otherwise.
    """
    if path.is_dir():
        raise ValueError(f"{what} must be a file, got {path}, which is a folder")
    if not path.parent.is_dir():
        raise ValueError(
            f"{what} must be in a folder that is there, got {path}: make {path.parent}"
        )
    if ends and path.suffix.lower() not in ends:
        raise ValueError(f"{what} must end in {' or '.join(ends)}, got {path}")
    return path
