"""What the command line prints: text as it is, never read as markup, on any terminal."""

import codecs
import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import Console

    from fedloom.result import Result

NOTHING_CHANGED = 3
"""Exit code of a run no round of which changed the model."""
_PLAIN = {
    "→": "->",
    "…": "...",
    "\u2013": "-",
    "\u2212": "-",
    "·": "-",
    "\u00d7": "x",
    "±": "+/-",
    "¶": "|",
}
"""What a terminal gets that has no letter for it; other letters get their number."""


def console() -> "Console":
    """Return a console for whatever a user's files hold: brackets and colons stay as they are."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def open_terminal() -> None:
    """Let output and errors take every letter, those that the terminal does not know by a stand-in."""
    codecs.register_error("fedloom", _stand_in)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fedloom")


def complain(sentence: str) -> None:
    """Print one sentence as one line to the errors."""
    print(f"fedloom: {' '.join(sentence.split())}", file=sys.stderr)  # noqa: T201


def _stand_in(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    plain = "".join(
        _PLAIN.get(letter) or letter.encode("ascii", "backslashreplace").decode()
        for letter in letters
    )
    return plain, error.end


def show_files(files: "Mapping[str, Path]", *, console: "Console") -> None:
    """Print where each file is that was written."""
    for name, file in files.items():
        console.print(f"{name}: {file}", markup=False, highlight=False, soft_wrap=True)


def show_outcome(result: "Result", *, console: "Console") -> None:
    """Print what came of a run, and end with exit code 3 where no round of it changed the model."""
    console.print(result.table())
    console.print(f"report: {result.report}", soft_wrap=True)
    own = result.summary
    if own["rounds"] and own.get("rounds_unchanged") == own["rounds"]:
        console.print("no round changed the model", style="yellow")
        sys.exit(NOTHING_CHANGED)
