"""A server and its sites as real processes on this machine, for benchmarks of federations."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import yaml

from fedloom.engines.flower.keys import Keys
from fedloom.engines.flower.processes import free_port

INJECTED = """
import os, sys, time
if "{program}" in sys.orig_argv:
{lines}
"""
"""A `sitecustomize` that changes one program of a site and nothing else."""
WORKER, NODE = "fedloom.deploy.worker", "fedloom.engines.flower.node"


@dataclass
class Sites:
    """Starts `fedloom serve` and `fedloom join`, and ends what is left of them."""

    folder: Path
    recipe: Mapping[str, Any]
    names: Sequence[str] = ("alba", "brno", "cork")
    port: int = field(default_factory=free_port)
    _started: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def __enter__(self) -> "Sites":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.keys = Keys(self.folder / "keys")
        self.keys.init(())
        for name in self.names:
            self.keys.add(name)
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(dict(self.recipe)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for process in self._started:
            process.send_signal(signal.SIGTERM)
        for process in self._started:
            process.wait()

    @property
    def out(self) -> Path:
        """Return the run's folder."""
        return self.folder / "run"

    def serve(self) -> "subprocess.Popen[bytes]":
        """Start the server, or go on with its run; return when it listens."""
        log, words = self.folder / "serve.log", ["--listen", f"127.0.0.1:{self.port}"]
        at = len(said(log))
        process = self.command(
            "serve",
            str(self.folder / "recipe.yaml"),
            *words,
            *("--keys", str(self.keys.folder), "--out", str(self.out)),
            log=log,
        )
        until(lambda: "listening on" in said(log)[at:], process)
        return process

    def join(
        self,
        name: str,
        data: Path,
        *options: str,
        keys: Path | None = None,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> "subprocess.Popen[bytes]":
        """Start a site."""
        key = keys or self.keys.folder / "sites" / name
        return self.command(
            *("join", f"127.0.0.1:{port or self.port}", "--name", name, "--data", str(data)),
            *("--keys", str(key), "--folder", str(self.folder / "sites" / name), *options),
            log=self.folder / f"{name}.log",
            environment=environment or {},
        )

    def command(
        self, *words: str, log: Path, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command of fedloom's."""
        with open(log, "ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedloom.cli", *words],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "COLUMNS": "400", **(environment or {})},
            )
        self._started.append(process)
        return process

    def injected(self, *lines: str, program: str = WORKER) -> dict[str, str]:
        """Return the environment of a site one of whose programs first runs these lines."""
        folder = self.folder / "injected"
        folder.mkdir(exist_ok=True)
        body = "\n".join(f"    {line}" for line in lines)
        (folder / "sitecustomize.py").write_text(INJECTED.format(lines=body, program=program))
        return {"PYTHONPATH": str(folder)}


def said(log: Path) -> str:
    """Return what a command printed, as plain text."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def metrics(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def below(process: "subprocess.Popen[bytes]", words: str) -> psutil.Process:
    """Return the program that a command started whose command line holds all the words."""

    def find() -> psutil.Process | None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                line = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if "guard.py" not in line and all(word in line for word in words.split()):
                return child
        return None

    found = until(find, process)
    assert isinstance(found, psutil.Process)
    return found


def until(
    true: Callable[[], Any], process: "subprocess.Popen[bytes] | None" = None, seconds: float = 600
) -> Any:
    """Wait until something is true, and return it; fail where that takes too long or the process ends."""
    end = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > end:
            raise TimeoutError(f"not true after {seconds:g} seconds")
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the command ended with {process.returncode}")
        time.sleep(0.1)
    return found
