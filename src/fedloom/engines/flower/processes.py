"""Programs that run beside this process: started with a log, kept running, ended with everything they started."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fedloom.engines.flower import guard


@dataclass
class Program:
    """One running program."""

    name: str
    log: Path
    process: "subprocess.Popen[bytes]"

    def alive(self) -> bool:
        """Return whether it still runs."""
        return self.process.poll() is None

    def last_words(self, lines: int = 4) -> str:
        """Return the end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        words = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(words[-lines:]) or "it said nothing"

    def stop(self) -> None:
        """End it and all it started; nothing of it runs when this returns."""
        assert self.process.stdin
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(guard.PATIENCE + 4)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _, left = psutil.wait_procs(family, timeout=3)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=3)


def start(
    name: str, command: Sequence[str], *, folder: Path, environment: Mapping[str, str]
) -> Program:
    """Start a program that ends when this process does, its output in `folder/NAME.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    with open(log, "ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-S", "-E", guard.__file__, *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    return Program(name, log, process)


@dataclass
class Keeper:
    """Starts a program again whenever it ends or is stuck, until told to stop."""

    launch: Callable[[], Program]
    on_restart: Callable[[Program], None] = lambda _: None
    stuck: Callable[[Program], bool] = lambda _: False
    """Whether a program that still runs is to be ended and started again."""
    pause: float = 0.5
    """Seconds before the first new start; doubles up to 16 while the program keeps ending at once."""
    _stopping: threading.Event = field(default_factory=threading.Event)
    _program: Program | None = None
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the program and watch over it."""
        self._program = self.launch()
        self._thread = threading.Thread(target=self._watch, name="keeper", daemon=True)
        self._thread.start()

    @property
    def program(self) -> Program:
        """Return the program as it runs now."""
        assert self._program, "not started"
        return self._program

    def stop(self) -> None:
        """End the program for good."""
        self._stopping.set()
        if self._thread:
            self._thread.join()
        if self._program:
            self._program.stop()

    def _watch(self) -> None:
        pause, began = self.pause, time.monotonic()
        while not self._stopping.wait(0.2):
            ended = self.program
            if ended.alive() and not self.stuck(ended):
                continue
            self.on_restart(ended)
            ended.stop()
            pause = self.pause if time.monotonic() - began > 30 else min(pause * 2, 16.0)
            if self._stopping.wait(pause):
                return
            began = time.monotonic()
            # A full disk takes no log: the program that has ended stays, and is looked at again.
            with contextlib.suppress(OSError):
                self._program = self.launch()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
