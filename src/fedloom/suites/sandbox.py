"""Programs that a model wrote, run against tests in a process of their own that can do little.

The child is Python without site packages and environment, in an empty folder, with its own limits on time, memory, files and
processes, without input, without network where the system lets an ordinary user have a network of its own, and with
sockets taken away in any case. It is a fence against accidents and mischief of a language model, not a jail: a program
that knows this file can say that it passed, and one that knows the kernel may do more. Use a machine or a container that
holds nothing of value.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SECONDS = 5
"""Of processor time that a program gets."""
MEMORY = 512 * 2**20
"""Bytes of address space."""
FILE = 2**20
"""Bytes of the largest file."""

_LIMITS = f"""
import resource as r
for what, most in ((r.RLIMIT_CPU, {SECONDS}), (r.RLIMIT_AS, {MEMORY}), (r.RLIMIT_FSIZE, {FILE}), (r.RLIMIT_CORE, 0),
                   (r.RLIMIT_NOFILE, 32), (r.RLIMIT_NPROC, 0)):
    r.setrlimit(what, (most, most))
"""
_FENCE = """
import sys as _s
import _posixsubprocess as _p, os as _o, posix as _x, signal as _g, _signal as _h
def _refused(*_, **__):
    raise PermissionError('a way out')
# Of these the hook is not told.
for _at, _names in (((_o, _x), ('mkfifo', 'mknod', 'utime', 'pidfd_open')), ((_g, _h), ('pidfd_send_signal',)), ((_p,), ('fork_exec',))):
    for _each in _at:
        for _name in _names:
            if hasattr(_each, _name):
                setattr(_each, _name, _refused)
del _p, _o, _x, _g, _h, _at, _names, _each, _name
def _guard(event, args, _no=(
    'socket.', 'subprocess.', 'os.fork', 'os.forkpty', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.system', 'os.kill',
    'os.killpg', 'pty.', 'ctypes.', 'signal.pthread_kill', 'syslog.', 'shutil.', 'os.chown', 'os.link', 'os.symlink',
    'os.remove', 'os.rename', 'os.rmdir', 'os.truncate', 'os.chmod', 'os.putenv', 'resource.setrlimit', 'resource.prlimit',
    'os.chdir', 'os.fchdir', 'os.mkdir', 'os.setxattr', 'gc.get_objects', 'gc.get_referrers',
    'sys.setprofile', 'sys.settrace', 'code.__new__', 'mmap.', 'sqlite3.')):
    if event.startswith(_no):
        raise PermissionError(event)
    if event == 'import' and args[0] in ('readline', '_dbm', '_gdbm', '_posixsubprocess', 'posix', '_signal'):
        raise PermissionError(f'import {args[0]}')
    # What imports read is Python's own.
    if event in ('os.listdir', 'os.scandir') and not (isinstance(args[0], (str, bytes)) and _here(args[0])):
        raise PermissionError(event)
    if event == 'open':
        path, mode, flags = args
        wants = (isinstance(mode, str) and mode.strip('rbtU')) or (isinstance(flags, int) and flags & 0o103)
        if wants or not isinstance(path, (str, bytes)) or not _here(path):
            raise PermissionError(f'open {path!r}')
def _here(path, _roots=tuple(_s.path) + (_s.base_prefix,), _fs=__import__('os').fspath):
    text = path.decode() if isinstance(path, bytes) else path
    return text.startswith(_roots) and '..' not in text
_s.addaudithook(_guard)
del _s
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a program."""

    passed: bool
    reason: str
    """Empty where it passed."""


@cache
def own_network() -> tuple[str, ...]:
    """Return the words before a command that give it a network of its own, without anything in it; empty where that is not allowed."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    words = (unshare, "--user", "--net")
    tried = subprocess.run([*words, "true"], capture_output=True, timeout=10, check=False)
    return words if tried.returncode == 0 else ()


def check_allowed(*, allow_code: bool) -> None:
    """Refuse to run what a model wrote unless somebody said so.

    Raises:
        ValueError: saying how.
    """
    if not allow_code:
        raise ValueError(
            "this suite runs programs that the model writes: allow that with --allow-code (allow_code=True), on a machine"
            " that holds nothing of value"
        )
    if sys.platform == "win32":
        raise ValueError("programs are run where the system can limit them, which Windows cannot")


def passes(program: str, tests: str, *, wall_seconds: float = SECONDS + 3) -> Verdict:
    """Return whether a program passes tests, which are statements behind it that raise where it is wrong.

    Args:
        program: What the model wrote.
        tests: Run after it, in the same namespace.
        wall_seconds: After which the child is ended, whatever it does.
    """
    # Ending early is not passing: what says that the tests were done is a word that the child hands back after them.
    word = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory(prefix="fedloom-code-") as folder:
        told, tell = os.pipe()
        heard, hear = os.pipe()
        os.write(hear, word)
        os.close(hear)
        script = Path(folder) / "program.py"
        script.write_text(_script(program, tests, heard, tell), encoding="utf-8")
        child = subprocess.Popen(
            [*own_network(), sys.executable, "-I", "-S", "-B", str(script)],
            cwd=folder,
            env={"PATH": "", "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(heard, tell),
            start_new_session=True,
        )
        os.close(tell)
        os.close(heard)
        try:
            _, errors = child.communicate(timeout=wall_seconds)
            reason = _last_line(errors) or f"ended with exit code {child.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"took longer than {wall_seconds:g} s"
        finally:
            _end(child)
        os.set_blocking(told, False)
        try:
            said = os.read(told, 2 * len(word))
        except BlockingIOError:
            said = b""
        finally:
            os.close(told)
    passed = said == word and child.returncode == 0
    return Verdict(passed, "" if passed else reason)


def _script(program: str, tests: str, heard: int, tell: int) -> str:
    """Return what the child runs: the fence, the program, its tests, and then the word from one pipe into the other."""
    return "\n".join(
        [
            _LIMITS,
            "def _run(source, tests, os, heard, tell):",
            "    import sys",
            "    code, checks = compile(source, 'program', 'exec'), compile(tests, 'tests', 'exec')",
            _indented(_FENCE),
            "    space = {'__name__': 'program'}",
            "    exec(code, space)",
            "    exec(checks, space)",
            "    os.write(tell, os.read(heard, 64))",
            f"_run({program!r}, {tests!r}, __import__('os'), {heard}, {tell})",
            "",
        ]
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End a child with all that it started, and wait for it."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        child.kill()
    child.wait()
    if child.stderr is not None:
        child.stderr.close()


def _last_line(errors: bytes) -> str:
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
