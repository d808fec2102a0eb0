"""What a run said while it went on, kept in its folder: a line each, with the time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.text import Text

FILE = "log.txt"


class RunLog(RenderHook):
    """Writes down every sentence that a console is given, shown or not; tables and bars are none."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Note sentences, and hand all on as it is."""
        for renderable in renderables:
            if isinstance(renderable, Text):
                self.write(renderable.plain)
        return renderables

    def write(self, sentence: str) -> None:
        """Add a line; what breaks lines does not, so that a client's name is never a line of its own."""
        words = " ".join("".join(c if c.isprintable() else " " for c in sentence).split())
        if words:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            # A full disk ends a run where its results go, not here.
            with (
                suppress(OSError),
                self._file.open("a", encoding="utf-8", errors="backslashreplace") as out,
            ):
                out.write(f"{now} {words}\n")


@contextmanager
def logged(console: Console, folder: Path, *, quiet: bool) -> Iterator[RunLog | None]:
    """Keep what `console` is given in a run's folder; nothing where that tells of single clients and may not."""
    if quiet:
        yield None
        return
    log = RunLog(folder / FILE)
    console.push_render_hook(log)
    try:
        yield log
    finally:
        console.pop_render_hook()


def tail(folder: Path, num_lines: int, *, num_bytes: int = 1 << 16) -> list[str]:
    """Return the last lines of a run's log, of those in its last `num_bytes`; none where it has no log."""
    file = folder / FILE
    if not file.is_file():
        return []
    with file.open("rb") as out:
        size = out.seek(0, os.SEEK_END)
        out.seek(max(0, size - num_bytes))
        lines = out.read().decode("utf-8", errors="replace").split("\n")
    # The first may have lost its beginning, the last is empty or still being written.
    whole = lines[:-1] if size <= num_bytes else lines[1:-1]
    return whole[-num_lines:]
