"""Programs of a model: right ones pass, wrong ones fail, and what wants out does not get out."""

import sys
import time
from pathlib import Path

import pytest

from fedloom.suites import sandbox
from fedloom.suites.sandbox import check_allowed, passes

TESTS = "def check(f):\n    assert f(2) == 4\n\ncheck(double)\n"

FORK_EXEC = """
import _posixsubprocess, os
r, w = os.pipe()
words, none = [b"/bin/sh", b"-c", b"touch TARGET"], [-1] * 6
child = _posixsubprocess.fork_exec(
    words, words[:1], True, (w,), None, None, *none, r, w, False, False, -1, None, None, None, -1, None, False
)
os.waitpid(child, 0)
"""
"""A program that is started without subprocess, as Python 3.11 does."""


def test_a_right_program_passes_and_a_wrong_one_says_why() -> None:
    good = "from typing import List\nimport math, re, collections, itertools, heapq\ndef double(x):\n    return 2 * x\n"
    assert passes(good, TESTS).passed
    wrong = passes("def double(x):\n    return x\n", TESTS)
    assert not wrong.passed
    assert "AssertionError" in wrong.reason
    assert "SyntaxError" in passes("def double(x)\n", TESTS).reason


@pytest.mark.slow
@pytest.mark.parametrize(
    "escape",
    [
        "while True: pass",
        "import os\nwhile True: os.fork()",
        "x = bytearray(2 * 2**30)",
        "import socket\nsocket.create_connection(('127.0.0.1', PORT))",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "open('TARGET', 'w').write('out')",
        "import os\nos.open('TARGET', os.O_CREAT | os.O_WRONLY)",
        "import pathlib\npathlib.Path('TARGET').write_text('out')",
        "import os\nos.system('touch TARGET')",
        "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'touch TARGET'])",
        "open('/etc/passwd').read()",
        "open('../../../etc/passwd').read()",
        "import os\nos.listdir('/')",
        "import ctypes\nctypes.CDLL(None).system(b'touch TARGET')",
        "input()",
        "import signal\nsignal.signal(signal.SIGALRM, print)\nimport time\ntime.sleep(60)",
        "import os\nassert os.environ.get('HOME') is not None",
        "import sys\nsys.addaudithook(print)\nopen('TARGET', 'w')",
        # Of these Python tells no hook, or another event than of files.
        "import sqlite3\nsqlite3.connect('TARGET').execute('create table t(x)')",
        "import os\nos.mkfifo('TARGET')",
        "import sys\ndel sys.modules['posix']\nimport posix\nposix.mknod('TARGET')",
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
        FORK_EXEC,
    ],
)
def test_what_wants_out_does_not_pass_and_does_nothing(tmp_path: Path, escape: str) -> None:
    import socket

    target = tmp_path / "target"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        text = escape.replace("TARGET", str(target)).replace("PORT", str(port))
        began = time.monotonic()
        found = passes(f"{text}\ndef double(x):\n    return 2 * x\n", TESTS, wall_seconds=6)
        assert time.monotonic() - began < 30
        with pytest.raises(TimeoutError):
            listener.accept()
    assert not found.passed, escape
    assert found.reason or escape
    assert not target.exists()


def test_it_is_the_fence_that_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    program = f"open({str(target)!r}, 'w').write('out')\ndef double(x):\n    return 2 * x\n"
    assert not passes(program, TESTS).passed
    assert not target.exists()
    monkeypatch.setattr(sandbox, "_FENCE", "")
    monkeypatch.setattr(sandbox, "own_network", tuple)
    assert passes(program, TESTS).passed
    assert target.read_text() == "out"


def test_code_runs_only_where_somebody_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="allow that with --allow-code"):
        check_allowed(allow_code=False)
    check_allowed(allow_code=True)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ValueError, match="which Windows cannot"):
        check_allowed(allow_code=True)
