"""One process a folder: who holds it is said, and nobody holds it who is gone."""

import errno
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedloom.rounds.lock import FILE, InUse, held


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    who = rf"run is in use by process {os.getpid()} on {socket.gethostname()} since 20"
    with held(folder):
        with pytest.raises(InUse, match=who), held(folder):
            pass
        assert (folder / FILE).exists()
    assert not folder.exists(), "made for the lock alone"
    with held(folder):
        (folder / "recipe.yaml").write_text("x")
    assert os.listdir(folder) == ["recipe.yaml"]


def test_baselines_belong_to_their_run(tmp_path: Path) -> None:
    below = tmp_path / "run" / "baselines" / "local"
    with held(tmp_path / "run"), pytest.raises(InUse, match=r"run is in use"), held(below):
        pass
    with held(below), pytest.raises(InUse, match=r"run is in use"), held(tmp_path / "run"):
        pass


def test_a_process_that_is_killed_lets_go(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:
        with held(tmp_path):
            (tmp_path / "ready").write_text("")
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    with pytest.raises(InUse, match=f"process {pid} on"), held(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / FILE).exists(), "its last words are there, and hinder nobody"
    with held(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / FILE).exists()


def test_an_error_lets_go(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        raise ZeroDivisionError
    with held(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "no json", "[1]", '{"pid": "x"}', '{"pid": 1}'])
def test_whatever_a_lock_that_nobody_holds_says_it_hinders_nobody(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / FILE).write_text(content)
    with held(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def told(**holder: Any) -> str:
    own = {"pid": os.getppid(), "host": socket.gethostname(), "since": "2999-01-01T00:00:00+00:00"}
    return json.dumps({**own, "command": "fedloom run x", **holder})


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_process_that_lives_holds_the_folder(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(told())
    with (
        pytest.raises(InUse, match=r"\(fedloom run x\): .*; if it is gone, remove .*lock$"),
        held(tmp_path),
    ):
        pass
    (tmp_path / FILE).write_text(told(host="another"))
    with pytest.raises(InUse, match=r"on another since .*; if it is gone, remove"), held(tmp_path):
        pass


@pytest.mark.usefixtures("no_locks")
def test_without_locks_one_that_is_gone_does_not(tmp_path: Path) -> None:
    gone = next(n for n in range(2**22, 1, -1) if not psutil.pid_exists(n))
    # A number that another process has by now is told by when that began.
    for holder in ({"pid": gone}, {"since": "1999-01-01T00:00:00+00:00"}, {"pid": "x"}):
        (tmp_path / FILE).write_text(told(**holder))
        with held(tmp_path):
            assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


def test_a_file_in_the_place_of_the_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with (
        pytest.raises(ValueError, match="run is a file, and a run needs a folder"),
        held(tmp_path / "run"),
    ):
        pass


def test_a_folder_nobody_may_write_to_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any) -> Callable[..., int]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with (
        pytest.raises(ValueError, match=r"cannot be written to: Permission denied$"),
        held(tmp_path),
    ):
        pass
