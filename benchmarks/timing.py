"""Paired timing: candidates take turns, so that what disturbs the machine disturbs them all.

CPU time of the process, on one thread: it hardly changes on a busy machine, where wall time does by factors.
"""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shlex import quote


@dataclass(frozen=True, slots=True)
class Timing:
    """One candidate's CPU seconds, in the order they were measured."""

    seconds: Sequence[float]

    @property
    def median(self) -> float:
        """Return the median, seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Return the distance of the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median

    def ratio(self, other: "Timing") -> float:
        """Return how many times longer the other takes: the median of the ratios turn by turn."""
        turns = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(theirs / mine for mine, theirs in turns)


def paired(
    candidates: Mapping[str, Callable[[], object]],
    *,
    turns: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Timing]:
    """Run every candidate once a turn, in alternating order, and return their times."""
    for candidate in candidates.values():
        for _ in range(warm_up):
            candidate()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(turns):
        for name in names if turn % 2 == 0 else reversed(names):
            begin = clock()
            candidates[name]()
            seconds[name].append(clock() - begin)
    return {name: Timing(times) for name, times in seconds.items()}


def about(packages: Sequence[str], *, threads: int = 1) -> str:
    """Return the machine, the date, the command and the versions a table was made with."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    running = "one thread" if threads == 1 else f"{threads} threads"
    return "\n".join(
        (
            f"machine   {processor()}, {platform.system()} {platform.machine()}, {running}",
            f"date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            f"command   python {' '.join(map(_anywhere, sys.argv))}",
            f"versions  python {platform.python_version()}, {', '.join(found)}",
        )
    )


def _anywhere(word: str) -> str:
    """Return a word of a command line without the folders of this machine, as a shell takes it."""
    if word.startswith("/"):
        home = str(Path.home())
        inside = word.startswith(home)
        word = word.replace(home, "~", 1) if inside else "/".join(word.split("/")[-2:])
    # A shell knows its home by a bare ~ only.
    return f"~{quote(word[1:])}" if word.startswith("~/") else quote(word)


def processor() -> str:
    """Return what the machine's processor is called."""
    try:
        listed = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or "unknown processor"
    names = [line.split(":", 1)[1].strip() for line in listed.splitlines() if "Model name" in line]
    return names[0] if names else "unknown processor"


def write_page(name: str, title: str, text: str, *, packages: Sequence[str] = ("torch",)) -> None:
    """Write a page of `results` in Markdown: a title, what it was measured on, and the text."""
    heading = f"# {title}\n\n```text\n{about(packages)}\n```"
    (Path(__file__).parent / "results" / name).write_text(f"{heading}\n\n{text}\n")
