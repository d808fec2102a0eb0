"""One process a run's folder: whoever writes into it holds it, and lets go when it ends, however it ends."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from fedloom.rounds.inputs import now

FILE = "lock"
_CANNOT = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems without locks answer, some of NFS among them."""


class InUse(ValueError):
    """Another process writes into the folder."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run's folder, with the baselines in it; a folder made for that is gone again if it stays empty.

    Raises:
        InUse: where another process holds it, with who that is.
        ValueError: where it cannot be written to.
    """
    root = root_of(folder)
    made = [path for path in (root, *root.parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(root / FILE, root)
    except FileExistsError as error:
        raise ValueError(f"{root} is a file, and a run needs a folder: name another") from error
    except OSError as error:
        raise ValueError(f"{root} cannot be written to: {error.strerror}") from error
    try:
        yield
    finally:
        # Before it is let go: whoever takes the file from here on finds that it has no name any more.
        (root / FILE).unlink(missing_ok=True)
        os.close(descriptor)
        for path in made:
            try:
                path.rmdir()
            except OSError:
                break


def holder(folder: Path) -> Mapping[str, Any] | None:
    """Return who is at work in a run's folder, as far as can be seen without touching it; None for nobody.

    What a killed process left is nobody; one on another host cannot be asked, and counts as at work.
    """
    found = _holder(root_of(folder) / FILE)
    return found if _lives(found) else None


def root_of(folder: Path) -> Path:
    """Return the folder of the run that a baseline belongs to, or the folder itself."""
    above = folder.absolute().parent
    return above.parent if above.name == "baselines" else folder


def _locked(file: Path, root: Path) -> int:
    """Return the descriptor that holds the lock, for as long as it is open."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(descriptor, file, root)
            if os.fstat(descriptor).st_nlink:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_own()).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(
            descriptor
        )  # of a process that has just let go: there is another file by now, or none


def _take(descriptor: int, file: Path, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUse(_in_use(root, _patiently(file))) from None
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        # Without locks there is only what the file says; two that start in the same instant are not told apart.
        holder = _holder(file)
        if _lives(holder):
            raise InUse(f"{_in_use(root, holder)}; if it is gone, remove {file}") from None


def _own() -> dict[str, Any]:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": now(), "command": command}


def _patiently(file: Path) -> Mapping[str, Any]:
    """Return what a holder tells of itself, which it does right after it has taken the file."""
    for _ in range(20):
        if holder := _holder(file):
            return holder
        time.sleep(0.05)
    return {}


def _holder(file: Path) -> Mapping[str, Any]:
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _in_use(root: Path, holder: Mapping[str, Any]) -> str:
    who = "another process"
    if holder:
        who = "process {pid} on {host} since {since} ({command})".format_map(
            {"pid": "?", "host": "?", "since": "?", "command": "?", **holder}
        )
    return f"{root} is in use by {who}: wait for it, or end it first"


def _lives(holder: Mapping[str, Any]) -> bool:
    """Return whether the holder may still be at work; one on another host cannot be asked."""
    if not holder or holder.get("host") != socket.gethostname():
        return bool(holder)
    try:
        # A process that began later has the number of one that is gone; the clock of either may be a second off.
        began = psutil.Process(holder["pid"]).create_time()
        return began < datetime.fromisoformat(holder["since"]).timestamp() + 2
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError, OverflowError):
        return False
