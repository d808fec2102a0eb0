"""A run that is killed, whenever, goes on to the bit."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom import experiment
from fedloom.core.randomness import derive
from fedloom.rounds.recipe_settings import Recipe

SECONDS = 120


def start(recipe: Recipe, folder: Path, die_at: int | None = None, *, late: bool = False) -> int:
    """Run the recipe in a forked child, which has everything imported already; return its pid.

    With `die_at`, the child kills itself right before the n-th file is put in place (right after it, if `late`): in
    the middle of writing checkpoints, memories and reports.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        if die_at is not None:
            replace, calls = os.replace, iter(range(10**9))

            def last_words(*paths: Any) -> None:
                due = next(calls) == die_at
                if due and not late:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(*paths)
                if due:
                    os.kill(os.getpid(), signal.SIGKILL)

            os.replace = last_words  # type: ignore[assignment]
        experiment.run(recipe, folder)
    except BaseException as error:  # noqa: BLE001 a fork must not return into pytest
        said = folder.with_name(f"{folder.name}-{os.getpid()}.said")
        said.write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    """Return the exit code of a child, negative where a signal ended it."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("a run hangs")


def left_behind(folder: Path) -> tuple[Any, ...]:
    """Return what two equal runs agree on: state, metrics, client memory and adapters."""
    summary = json.loads((folder / "summary.json").read_text())
    kept = {
        str(file.relative_to(folder)): file.read_bytes()
        for name in ("client_state", "adapters")
        for file in sorted((folder / name).rglob("*"))
        if file.is_file() and file.name != "README.md"
    }
    return summary["state_sha256"], summary["final"], summary["upload_bytes"], kept


@pytest.mark.slow
def test_twenty_of_twenty_killed_runs_end_as_the_uninterrupted_one(
    small_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Twelve kills at random moments, eight right before or after a file is put in place."""
    recipe = small_recipe(
        algorithm=[{"ditto": {"steps": 1}}, {"fedavg": {"server": "adam"}}],
        cohort={"uniform": {"size": 3}},
        run={"rounds": 4, "samples": 0},
        evaluation={"every": 0, "generate": False},
    )
    began = time.monotonic()
    assert ended(start(recipe, tmp_path / "whole")) == 0
    seconds = time.monotonic() - began
    expected = left_behind(tmp_path / "whole")
    chance = random.Random(derive(0, "kills"))
    survived = 0
    for number in range(20):
        folder = tmp_path / f"killed-{number}"
        if number < 12:
            pid = start(recipe, folder)
            time.sleep(chance.uniform(0.05, 0.95) * seconds)
            os.kill(pid, signal.SIGKILL)
        else:
            pid = start(recipe, folder, die_at=chance.randrange(2, 24), late=number % 2 == 1)
        ended(pid)
        assert ended(start(recipe, folder)) == 0
        survived += left_behind(folder) == expected
    assert survived == 20


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_of_two_processes_on_one_folder_one_wins_and_the_other_says_who(
    small_recipe: Callable[..., Recipe], tmp_path: Path, *, killed: bool
) -> None:
    """A run and a resume, and two that resume: the same bytes as one alone, whoever comes first."""
    recipe = small_recipe(
        algorithm=[{"ditto": {"steps": 1}}, {"fedavg": {"server": "adam"}}],
        cohort={"uniform": {"size": 3}},
        run={"rounds": 4, "samples": 0, "baselines": ["local"]},
        evaluation={"every": 1, "generate": False},
    )
    began = time.monotonic()
    assert ended(start(recipe, tmp_path / "whole")) == 0
    seconds = time.monotonic() - began
    expected = left_behind(tmp_path / "whole")
    rows = (tmp_path / "whole" / "clients.jsonl").read_text().count("\n")
    chance = random.Random(derive(1, "races"))
    for number in range(4):
        folder = tmp_path / f"raced-{number}"
        if killed:
            pid = start(recipe, folder)
            time.sleep(chance.uniform(0.3, 0.8) * seconds)
            os.kill(pid, signal.SIGKILL)
            ended(pid)
        pids = [start(recipe, folder)]
        time.sleep(chance.uniform(0.0, 0.3) * seconds)
        pids.append(start(recipe, folder))
        codes = dict(zip(pids, map(ended, pids), strict=True))
        for pid, code in codes.items():
            if code:
                said = folder.with_name(f"{folder.name}-{pid}.said").read_text()
                (other,) = set(pids) - {pid}
                assert re.search(
                    rf"^InUse: .*raced-{number} is in use by process {other} on ", said
                )
        # The second may come when the first is done, and find nothing left to do.
        assert sorted(codes.values()) in ([0, 1], [0, 0])
        assert left_behind(folder) == expected
        assert (folder / "clients.jsonl").read_text().count("\n") == rows
        assert not (folder / "lock").exists()
        shutil.rmtree(folder)
