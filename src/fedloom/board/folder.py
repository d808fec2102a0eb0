"""Runs below a folder: found, and read only where nothing of them leads out of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from fedloom.rounds.failure import FILE as FAILED
from fedloom.rounds.lock import FILE as LOCK
from fedloom.tracking.metric_format import human_bytes

_MARKS = {"metrics.jsonl", "environment.json", "listen.json", FAILED, LOCK}
"""A folder with one of these files is a run's, or becomes one."""
_SEARCH = "search.db"
"""A folder with this file is a search's, which holds a lock as a run does; its trials are runs."""
_DEPTH = 6
_VISITED = 20_000
"""Folders that are looked into."""
_WHOLE = (".json", ".jsonl", ".yaml", LOCK, FAILED)
"""How names of files end that are read at once."""
_LARGEST = 1 << 28
"""Bytes of such a file."""
HERE = "."
"""What the folder itself is called, where it is a run's."""


class Unknown(ValueError):
    """No run of that name."""


@contextmanager
def told(what: Path) -> Iterator[None]:
    """Make a sentence of whatever is met in records that no run writes: a run is somebody else's folder.

    Raises:
        ValueError: in the place of every error but those of files.
    """
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(
            f"{what} holds what no run writes ({f'{kind}: {error}'.rstrip(': ')[:200]})"
        ) from error


@dataclass(frozen=True)
class Folder:
    """What is watched."""

    root: Path
    """Resolved."""

    @classmethod
    def at(cls, path: Path) -> "Folder":
        """Take a folder.

        Raises:
            ValueError: where there is none.
        """
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise ValueError(f"{path} {what}: give the folder that holds runs, such as runs")
        return cls(path.resolve())

    def command(self) -> str:
        """Return what to type for a first run here."""
        return f"fedloom run quickstart --out {quote(str(self.root / 'quickstart'))}"

    def runs(self) -> dict[str, Path]:
        """Return the folders of runs by their path below the root; links are not followed, runs not looked into."""
        return dict(self._found())

    def run(self, name: str) -> Path:
        """Return the folder of a run that was found: of no other name is a path made.

        Raises:
            Unknown: where there is no such run.
            ValueError: where something in it leads out of the root, or is no file.
        """
        found = self.runs().get(name)
        if found is None:
            raise Unknown(f"there is no run {name!r} in {self.root}")
        self.check(found)
        return found

    def check(self, run: Path) -> None:
        """Refuse a run of which a file is a link that leads out of the root, or nothing that can be read.

        Raises:
            ValueError: with the file's name.
        """
        for folder in (run, *self._inner(run)):
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink() and not self._is_inside(Path(entry.path)):
                        raise ValueError(f"{entry.path} is a link that leads out of {self.root}")
                    if not (entry.is_file() or entry.is_dir()):
                        raise ValueError(f"{entry.path} is neither a file nor a folder")
                    if entry.name.endswith(_WHOLE) and entry.stat().st_size > _LARGEST:
                        raise ValueError(
                            f"{entry.path} has {human_bytes(entry.stat().st_size)}, and the board reads files of at most"
                            f" {human_bytes(_LARGEST)}"
                        )

    def _is_inside(self, path: Path) -> bool:
        # Path.resolve has no answer where a link leads to itself.
        return Path(os.path.realpath(path)).is_relative_to(self.root)

    def _inner(self, run: Path) -> Iterator[Path]:
        """Yield the folders in a run that pages read."""
        for name in ("adapters", "baselines", "checkpoints", "client_state"):
            inner = run / name
            # Where it is itself a link that leads out, the run is refused for that.
            if inner.is_dir() and self._is_inside(inner):
                yield inner
        baselines = run / "baselines"
        if baselines.is_dir() and self._is_inside(baselines):
            yield from (path for path in sorted(baselines.iterdir()) if path.is_dir())

    def _found(self) -> Iterator[tuple[str, Path]]:
        waiting, visited = [(self.root, 0)], 0
        while waiting and visited < _VISITED:
            folder, depth = waiting.pop()
            visited += 1
            files, below = _listed(folder)
            if files & _MARKS and _SEARCH not in files:
                # A name is bytes, and what of them is no UTF-8 has no place on a page.
                name = os.fsencode(folder.relative_to(self.root))
                yield name.decode(errors="backslashreplace"), folder
            elif depth < _DEPTH:
                waiting += [(path, depth + 1) for path in below]


def _listed(folder: Path) -> tuple[set[str], list[Path]]:
    """Return the names of a folder's files, and the folders in it that are neither hidden nor links."""
    files, below = set[str](), list[Path]()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    files.add(entry.name)
                elif not entry.name.startswith("."):
                    below.append(Path(entry.path))
    except OSError:  # it may not be entered, or is gone
        return set(), []
    return files, sorted(below, reverse=True)
