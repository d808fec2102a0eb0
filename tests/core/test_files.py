"""Files that are either whole or absent."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.core.files import (
    DamagedFile,
    DiskFull,
    file_at,
    file_name,
    folder_at,
    read_hashed,
    write_atomic,
    write_hashed,
)


def fail(error: BaseException) -> Callable[..., None]:
    """Return a function that only raises."""

    def raises(*_: object, **__: object) -> None:
        raise error

    return raises


def test_a_file_is_written_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"one", b"", b"two")
    assert path.read_bytes() == b"onetwo"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_before_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"before")
    monkeypatch.setattr(os, step, fail(PermissionError(errno.EACCES, "no")))
    with pytest.raises(PermissionError):
        write_atomic(path, b"after")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_with_place_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"before")
    monkeypatch.setattr(os, "fsync", fail(OSError(code, "full")))
    with pytest.raises(DiskFull, match=r"^writing .*file needs 1000 bytes and \d+ are free: make"):
        write_atomic(path, b"x" * 400, b"y" * 600)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_too_full_for_a_folder_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "mkdir", fail(OSError(errno.ENOSPC, "full")))
    with pytest.raises(DiskFull, match=r"a/b/file needs 3 bytes"):
        write_atomic(tmp_path / "a" / "b" / "file", b"one")


def test_a_device_without_room_is_a_full_disk(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "file.part").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="needs 1000000 bytes"):
        write_atomic(tmp_path / "file", bytes(1_000_000))
    assert os.listdir(tmp_path) == []


FILL = """
import sys
from pathlib import Path
from fedloom.core.files import DiskFull, write_atomic
path = Path(sys.argv[1]) / "file"
write_atomic(path, b"before")
try:
    write_atomic(path, bytes(1 << 20))
except DiskFull as error:
    assert path.read_bytes() == b"before"
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    print(error)
"""


def test_a_small_file_system_that_runs_full_keeps_the_file_before(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=256k none {tmp_path}"
    sandbox = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    try:
        subprocess.run([*sandbox, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets nobody mount a tmpfs")
    script = f'{mount} && exec "{sys.executable}" -c "$0" {tmp_path}'
    done = subprocess.run([*sandbox, script, FILL], capture_output=True, text=True, check=True)
    assert "needs 1048576 bytes" in done.stdout


class Killed(BaseException):
    """Ends the process as far as the code can tell."""


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_killed_write_leaves_a_part_that_the_next_one_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"before")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail(Killed()))
        with pytest.raises(Killed):
            write_atomic(path, b"after")
    assert path.read_bytes() == b"before"
    assert (tmp_path / "file.part").exists()
    write_atomic(path, b"after")
    assert path.read_bytes() == b"after"
    assert os.listdir(tmp_path) == ["file"]


def test_a_hashed_file_comes_back(tmp_path: Path) -> None:
    for data in (b"", b"x", b"\n\n", bytes(range(256))):
        write_hashed(tmp_path / "file", data)
        assert read_hashed(tmp_path / "file") == data


@pytest.mark.parametrize("at", [0, 63, 64, 65, -1])
def test_a_changed_byte_is_noticed(tmp_path: Path, at: int) -> None:
    path = tmp_path / "file"
    write_hashed(path, b"some content")
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DamagedFile, match=r"file does not match its SHA-256"):
        read_hashed(path)


def test_an_empty_file_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DamagedFile):
        read_hashed(tmp_path / "file")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_private_file_and_its_folder_are_the_owners_whatever_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "private"
    write_atomic(folder / "below" / "file", b"secret", private=folder)
    assert (mode(folder), mode(folder / "below" / "file")) == (0o700, 0o600)
    folder.chmod(0o755)
    (folder / "file.part").write_bytes(b"left by a killed process")
    (folder / "file").write_bytes(b"older")
    for path in (folder / "file.part", folder / "file"):
        path.chmod(0o666)
    write_hashed(folder / "file", b"secret", private=folder)
    assert (mode(folder), mode(folder / "file")) == (0o700, 0o600)
    assert read_hashed(folder / "file") == b"secret"


def test_a_file_that_is_not_private_is_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "folder" / "file", b"public")
    finally:
        os.umask(before)
    assert (mode(tmp_path / "folder"), mode(tmp_path / "folder" / "file")) == (0o750, 0o640)


def test_a_folder_of_somebody_elses_keeps_its_mode_and_the_file_is_still_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = os.chmod

    def only_files(what: object, mode: int) -> None:
        if not isinstance(what, int):
            raise PermissionError(errno.EPERM, "not yours")
        change(what, mode)

    tmp_path.chmod(0o755)
    monkeypatch.setattr(os, "chmod", only_files)
    write_atomic(tmp_path / "file", b"secret", private=tmp_path)
    assert (mode(tmp_path), mode(tmp_path / "file")) == (0o755, 0o600)


def test_a_folder_may_be_there_or_not(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "a/b/c"):
        assert folder_at(path, "--out") == path
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_a_folder_cannot_be_made_of_or_in_a_file(below: str, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("")
    with pytest.raises(
        ValueError, match=r"--out must be a folder, got .*f, where .*f is a file|f/a"
    ):
        folder_at(file / below if below else file, "--out")


def test_a_file_needs_its_folder_and_its_ending(tmp_path: Path) -> None:
    assert file_at(tmp_path / "a.PNG", "--picture", ends=(".png",)) == tmp_path / "a.PNG"
    with pytest.raises(ValueError, match=r"--picture must be a file, got .*, which is a folder"):
        file_at(tmp_path, "--picture")
    with pytest.raises(
        ValueError, match=r"--picture must be in a folder that is there, got .*: make"
    ):
        file_at(tmp_path / "no/a.png", "--picture")
    with pytest.raises(ValueError, match=r"--picture must end in \.png or \.svg, got .*a\.gif"):
        file_at(tmp_path / "a.gif", "--picture", ends=(".png", ".svg"))


def test_a_name_stays_in_its_folder() -> None:
    assert file_name("../a\\b") == "..-a-b"
    assert file_name("xquad") == "xquad"
