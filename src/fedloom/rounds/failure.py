"""Why a run ended where it should not have: a file in its folder, until it gets farther."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedloom.core.files import write_atomic
from fedloom.rounds.lock import root_of

FILE = "failed.txt"
"""The reason in one line, and the traceback."""


@contextmanager
def failure_kept(folder: Path, *, quiet: bool) -> Iterator[None]:
    """Keep what ends a run in its folder, and nothing of it once the run is finished; whoever stops one is no failure.

    Args:
        folder: The run's, or that of a baseline of it.
        quiet: Whether the folder may tell nothing of single clients: then only the kind of error is kept.
    """
    root = root_of(folder)
    try:
        yield
    except Exception as error:
        write_failure(root, error, quiet=quiet)
        raise
    (root / FILE).unlink(missing_ok=True)


def write_failure(folder: Path, error: Exception, *, quiet: bool = False) -> str:
    """Write down why a run failed, and return the reason."""
    kind = type(error).__name__
    reason = " ".join(str(error).split()) or kind
    text = kind if quiet else f"{reason}\n\n{''.join(traceback.format_exception(error))}"
    write_atomic(folder / FILE, text.encode(errors="backslashreplace"))
    return reason


def read_failure(folder: Path) -> str | None:
    """Return why a run failed, None where it did not."""
    file = folder / FILE
    if not file.exists():
        return None
    return file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
