"""The noisy means a run's folder has sent, whichever checkpoint it goes on from."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedloom.core.description import Accounts, Release
from fedloom.core.files import DamagedFile, read_hashed, write_hashed
from fedloom.core.protocols import Algorithm
from fedloom.rounds.loop import Run


@dataclass(frozen=True, slots=True)
class Releases:
    """A file that only grows: a state knows what was released before it, not what was after.

    Runs without `private` have none. It is written after a round's checkpoint and before anything of that round is
    sent, so that what is in it may have been seen, and what is not in it was not.
    """

    path: Path
    algorithm: Algorithm[Any]
    """Keeps the account, or holds who does."""

    def charge(self, run: Run[Any], *, fresh: bool) -> Run[Any]:
        """Return the run with all of the file on its account, and the file with all of the run's in it.

        Args:
            run: Before its next round.
            fresh: Whether it has no checkpoint yet, so that there need not be a file.

        Raises:
            ValueError: where the file is gone or damaged, so that nobody knows what was sent.
        """
        if self._released(run) is None:
            return run
        if fresh and not self.path.exists():
            self._write(set())
        sent = self._read()
        assert isinstance(self.algorithm, Accounts)
        charged = replace(run, state=self.algorithm.charge(run.state, sent))
        self.record(charged)
        return charged

    def record(self, run: Run[Any]) -> None:
        """Add what a state has released; on the disk when this returns."""
        released = self._released(run)
        if released is None:
            return
        known = self._read()
        if not known.issuperset(released):
            self._write(known | released)

    def _released(self, run: Run[Any]) -> set[Release] | None:
        if not isinstance(self.algorithm, Accounts):
            return None
        released = self.algorithm.released(run.state)
        return None if released is None else set(released)

    def _read(self) -> set[Release]:
        try:
            rows = map(json.loads, read_hashed(self.path).splitlines())
            return {(int(number), str(seal), float(q), float(z)) for number, seal, q, z in rows}
        except (DamagedFile, OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self.path} says which noisy means were sent, and cannot be read ({error}): put it back, or begin a"
                " new run"
            ) from error

    def _write(self, releases: set[Release]) -> None:
        rows = "".join(json.dumps(release) + "\n" for release in sorted(releases))
        write_hashed(self.path, rows.encode(), private=self.path.parent)
