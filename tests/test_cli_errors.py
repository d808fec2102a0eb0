"""An error is one sentence: a user's says what to do, ours where its traceback is."""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedloom import cli_errors
from fedloom.cli_errors import OURS, STOPPED, USER, about, guard
from fedloom.core.files import DiskFull, folder_at
from fedloom.core.protocols import ClientError

Told = Callable[..., str]


@pytest.fixture
def told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Told:
    """Return a function that guards a command in an empty folder, checks its code and returns its only line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDLOOM_DEBUG", raising=False)

    def tell(command: Callable[[], object], code: int) -> str:
        assert guard(command, ["run", "x"]) == code
        said = capsys.readouterr().err
        assert said.startswith("fedloom: ")
        assert said.count("\n") == 1, said
        assert "Traceback" not in said
        return said

    return tell


def raising(error: BaseException) -> Callable[[], object]:
    def command() -> None:
        raise error

    return command


def test_what_the_package_words_is_said_and_nothing_else(told: Told, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    said = told(lambda: folder_at(Path("f/x"), "--out"), USER)
    assert said == "fedloom: --out must be a folder, got f/x, where f is a file\n"
    assert not list(tmp_path.glob("*.log"))


def test_a_refusal_that_escapes_is_a_users(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_errors, "_PACKAGE", str(Path(__file__).parent))
    assert told(raising(ClientError("client-1 has no\nexamples")), USER) == (
        "fedloom: client-1 has no examples\n"
    )


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.csv"), "a.csv: no such"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "d"), "d: is a directory"),
        (PermissionError(errno.EACCES, "Permission denied", "p"), "p: permission denied: its rig"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device: make room"),
        (OSError(errno.EROFS, "Read-only file system", "r"), "r: read-only file system: it cannot"),
        (MemoryError(), "out of memory (MemoryError): lower local.batch_size"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore"),
            "out of memory ([enforce fail] DefaultCPUAllocator: can't allocate memory): lower",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory (CUDA out of memory."),
        (ModuleNotFoundError("x", name="flwr.common"), "pip install 'fedloom[flower]'"),
        (ModuleNotFoundError("x", name="dp_accounting"), "pip install 'fedloom[dp]'"),
    ],
)
def test_what_the_machine_says_is_one_sentence(
    error: Exception, sentence: str, told: Told, tmp_path: Path
) -> None:
    assert sentence in told(raising(error), USER)
    assert not list(tmp_path.glob("*.log"))


@pytest.mark.parametrize(
    "command",
    [
        raising(KeyError("x")),
        raising(AssertionError()),
        raising(RuntimeError("size mismatch\nfor a.weight")),
        lambda: 1 / 0,
        lambda: torch.zeros(2) @ torch.zeros(3),
    ],
)
def test_a_fault_of_ours_says_so_and_leaves_its_traceback(
    command: Callable[[], object], told: Told, tmp_path: Path
) -> None:
    said = told(command, OURS)
    (log,) = tmp_path.glob("fedloom-error-*.log")
    assert "this is a fault of fedloom, not of what it was given" in said
    assert log.name in said
    assert "Traceback (most recent call last)" in log.read_text()


def test_a_sentence_that_nobody_worded_has_its_details_in_a_file(
    told: Told, tmp_path: Path
) -> None:
    said = told(lambda: json.loads("{"), USER)
    (log,) = tmp_path.glob("fedloom-error-*.log")
    assert "Expecting property name" in said
    assert log.name in said


def test_the_traceback_of_a_run_is_in_its_folder(told: Told, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()

    def command() -> None:
        about(tmp_path / "runs")
        raise KeyError("x")

    for _ in range(2):
        assert str(tmp_path / "runs") in told(command, OURS)
    assert len(list((tmp_path / "runs").glob("fedloom-error-*.log"))) == 2


def test_where_nothing_can_be_written_the_sentence_is_said_all_the_same(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_errors, "_places", lambda name: iter([Path("nowhere") / name]))
    said = told(raising(KeyError("x")), OURS)
    assert "fault of fedloom" in said
    assert "details" not in said


def test_debugging_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_DEBUG", "1")
    with pytest.raises(KeyError):
        guard(raising(KeyError("x")), [])
    with pytest.raises(DiskFull):
        guard(raising(DiskFull("x")), [])


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(STOPPED)])
def test_an_interrupt_says_how_to_go_on(end: BaseException, told: Told) -> None:
    assert "`fedloom resume` goes on" in told(raising(end), STOPPED)


def test_an_exit_keeps_its_code() -> None:
    codes = [guard(raising(SystemExit(code)), []) for code in (None, 0, 2, 143)]
    assert codes == [0, 0, 2, 143]


def test_an_empty_argument_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert guard(raising(AssertionError()), ["run", "x", "--out", " "]) == USER
    assert "argument 4 of the command is empty" in capsys.readouterr().err


def test_a_closed_pipe_ends_quietly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert guard(lambda: sys.stdout.write("x" * 100_000), []) == OURS
        assert guard(lambda: None, []) == 0, "nothing is left that could fail again"
