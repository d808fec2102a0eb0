"""Keys, pipes, programs and the proxy by themselves; Flower itself is not started."""

import datetime
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedloom.engines.flower import pipe
from fedloom.engines.flower.processes import Keeper, Program, start


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(true: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


SLEEPER = [
    sys.executable,
    "-S",
    "-c",
    "import os, time; print(os.getpid(), flush=True); time.sleep(99)",
]


def pid_of(program: Program) -> int:
    until(lambda: program.log.exists() and program.log.read_text().strip())
    return int(program.log.read_text().split()[-1])


def test_a_letter_survives_the_pipe():
    here, there = socket.socketpair()
    with here, there:
        pieces = [b"", b"abc", bytes(3_000_000)]
        writer = threading.Thread(target=pipe.send, args=(here, {"kind": "work"}, pieces))
        writer.start()
        assert pipe.receive(there) == ({"kind": "work"}, pieces)
        writer.join()


def test_a_side_that_hangs_up_is_noticed():
    here, there = socket.socketpair()
    with there:
        here.sendall(b"\x05")
        here.close()
        with pytest.raises(ConnectionError, match="gone"):
            pipe.receive(there)


def test_a_socket_is_its_owners_alone(tmp_path: Path):
    with pipe.listen(tmp_path / "s"):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_a_worker_answers_the_next_letter_whatever_the_last_one_did(tmp_path: Path):
    def answer(header: dict[str, Any], pieces: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        if header["n"] == 1:
            raise OSError("no room on the disk")
        if header["n"] == 2:
            raise ZeroDivisionError("of a model's own code")
        return {"n": header["n"]}, pieces

    door = threading.Thread(target=pipe.serve, args=(tmp_path / "w", answer), daemon=True)
    door.start()
    until((tmp_path / "w").exists)
    said = []
    for n in (1, 2, 3):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(tmp_path / "w"))
            pipe.send(caller, {"n": n}, [b"x"])
            said.append(pipe.receive(caller)[0])
    assert said == [
        {"refusal": "OSError: no room on the disk"},
        {"refusal": "ZeroDivisionError: of a model's own code"},
        {"n": 3},
    ]


def test_a_program_is_ended_with_what_it_started(tmp_path: Path):
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(99)'],"
        " start_new_session=True); print(p.pid, flush=True); p.wait()"
    )
    program = start("p", [sys.executable, "-S", "-c", code], folder=tmp_path, environment={})
    child = pid_of(program)
    program.stop()
    assert not program.alive()
    until(lambda: ended(child))


def test_a_program_ends_when_the_process_that_started_it_is_killed(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from fedloom.engines.flower.processes import start;"
        f" start('p', {SLEEPER!r}, folder=Path({str(tmp_path)!r}), environment={{}}); time.sleep(99)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    until((tmp_path / "p.log").exists)
    until(lambda: (tmp_path / "p.log").read_text().strip())
    child = int((tmp_path / "p.log").read_text().split()[-1])
    parent.kill()
    parent.wait()
    until(lambda: ended(child))


def test_a_keeper_starts_a_killed_program_again_and_stops_for_good(tmp_path: Path):
    restarts: list[Program] = []
    keeper = Keeper(
        lambda: start("p", SLEEPER, folder=tmp_path, environment={}), restarts.append, pause=0.05
    )
    keeper.start()
    first = pid_of(keeper.program)
    os.kill(first, 9)
    until(lambda: len((tmp_path / "p.log").read_text().split()) == 2)
    second = pid_of(keeper.program)
    assert second != first
    assert len(restarts) == 1
    keeper.stop()
    until(lambda: ended(second))


def test_keys_are_made_once_and_private(tmp_path: Path):
    pytest.importorskip("cryptography", reason="the extra `flower` is not installed")
    from fedloom.engines.flower.keys import Keys

    keys = Keys(tmp_path / "keys")
    with pytest.raises(ValueError, match=r"holds no keys: `fedloom keys init` makes them"):
        keys.add("alba")
    with pytest.raises(ValueError, match=r"ca.crt does not exist: `fedloom keys init` makes it"):
        keys.check()
    keys.init(["site.example", "10.0.0.7"])
    keys.check()
    assert keys.covers("site.example")
    assert keys.covers("10.0.0.7")
    assert keys.covers("127.0.0.1")
    assert not keys.covers("10.0.0.8")
    folder = keys.add("alba")
    assert list(keys.sites()) == ["alba"]
    for private in (keys.folder / "ca.key", keys.certificate_key, folder / "node.key"):
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    for inside in (keys.folder, folder):
        assert stat.S_IMODE(inside.stat().st_mode) == 0o700
    assert (folder / "ca.crt").read_bytes() == keys.ca.read_bytes()
    with pytest.raises(ValueError, match="holds keys already"):
        keys.init([])
    with pytest.raises(ValueError, match="alba exists already"):
        keys.add("alba")
    with pytest.raises(ValueError, match=r"small letters, digits, - and _, at most 63, got 'A/b'"):
        keys.add("A/b")


def at(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    from fedloom.engines.flower import keys

    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    monkeypatch.setattr(keys, "_now", lambda: when)


def test_a_certificate_that_has_expired_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from fedloom.engines.flower.keys import Keys, check_dates

    keys = Keys(tmp_path / "keys")
    at(monkeypatch, -800)
    keys.init(["site.example"])
    at(monkeypatch, 0)
    keys.check()
    at(monkeypatch, 26)
    with pytest.raises(
        ValueError, match=r"ca\.crt expired on .*: make new keys with `fedloom keys init`"
    ):
        keys.check()
    at(monkeypatch, -900)
    with pytest.raises(ValueError, match=r"ca\.crt is valid from .* set this machine's clock"):
        check_dates(keys.ca, "")


def test_a_server_gets_a_new_certificate_that_sites_know_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from cryptography import x509

    from fedloom.engines.flower.keys import Keys

    keys = Keys(tmp_path / "keys")
    with pytest.raises(ValueError, match=r"ca\.crt does not exist: `fedloom keys init` makes it"):
        keys.renew()
    keys.init(["site.example"])
    authority, old = keys.ca.read_bytes(), keys.certificate.read_bytes()
    at(monkeypatch, 10)
    keys.renew(["other.example"])
    assert keys.ca.read_bytes() == authority
    assert keys.certificate.read_bytes() != old
    assert keys.covers("site.example")
    assert keys.covers("other.example")
    made = x509.load_pem_x509_certificate(keys.certificate.read_bytes())
    made.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
    assert keys.certificate_key.stat().st_mode & 0o777 == 0o600


def test_a_key_does_not_inherit_the_mode_of_a_file_that_was_there(tmp_path: Path) -> None:
    """As a process leaves it that was killed before the certificate was written."""
    pytest.importorskip("cryptography", reason="the extra `flower` is not installed")
    from fedloom.engines.flower.keys import Keys

    keys = Keys(tmp_path / "keys")
    keys.folder.mkdir()
    (keys.folder / "ca.key").touch(mode=0o644)
    keys.init([])
    assert stat.S_IMODE((keys.folder / "ca.key").stat().st_mode) == 0o600
    assert b"PRIVATE KEY" in (keys.folder / "ca.key").read_bytes()
