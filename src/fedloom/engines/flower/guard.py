"""Runs a program for as long as the process that asked for it lives: its end, however it came, closes our input.

Imports the standard library only, and is run by its path, so that it costs next to nothing.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys

PATIENCE = 8.0
"""Seconds a program has to end before it is killed."""


def main(command: list[str]) -> int:
    """Return the program's exit code."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    # Whoever started this decides by the pipe; a terminal's Ctrl-C is not for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while child.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], 0.2)
        if readable and not os.read(sys.stdin.fileno(), 1):
            return _end(child)
    return child.returncode


def _end(child: "subprocess.Popen[bytes]") -> int:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
