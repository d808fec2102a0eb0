"""Flower's own programs with the settings we rely on: SuperLink, SuperNode, and the run that connects them to us."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fedloom.engines.flower.keys import Keys
from fedloom.engines.flower.processes import Program, free_port, start

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
}
_BIN = Path(sys.executable).parent
_APP = """[project]
name = "fedloom-relay"
version = "{version}"
description = "Hands envelopes on; the code is the one installed at each site."
license = {{ text = "Apache-2.0" }}
dependencies = []
[tool.flwr.app]
publisher = "fedloom"
[tool.flwr.app.components]
serverapp = "fedloom.engines.flower.app:server_app"
clientapp = "fedloom.engines.flower.app:client_app"
[tool.flwr.app.config]
socket = ""
"""
NAME = "fedloom"
_STUCK = 5.0
"""Seconds without another word after which an error was the last one."""


class FlowerError(ValueError):
    """A program of Flower that does not do what it is there for; the message holds its last words."""


@dataclass
class SuperLink:
    """The server that SuperNodes talk to, on a loopback port of its own."""

    folder: Path
    keys: Keys
    port: int

    def start(self) -> Program:
        """Start it and wait until it listens."""
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{NAME}"\n[superlink.{NAME}]\n'
            f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{self.keys.ca}"\n'
        )
        keys = self.keys
        program = start(
            "superlink",
            [
                str(_BIN / "flower-superlink"),
                *("--host", "127.0.0.1", "--port", str(self.port)),
                "--disable-runtime-dependency-installation",
                *("--ssl-ca-certfile", str(keys.ca), "--ssl-certfile", str(keys.certificate)),
                *("--ssl-keyfile", str(keys.certificate_key), "--enable-supernode-auth"),
            ],
            folder=self.folder,
            environment=self._environment(),
        )
        wait_for(program, self.port)
        return program

    def register(self) -> Mapping[str, str]:
        """Let in the sites that have a key; return their names by node."""
        names = {}
        for site, public in self.keys.sites().items():
            result = self.flwr("supernode", "register", str(public), NAME, "--name", site)
            names[str(result["node-id"])] = site
        return names

    def submit(self, pipe: Path) -> None:
        """Start the run whose server half connects to our socket."""
        app = self.folder / "app"
        app.mkdir(exist_ok=True)
        (app / "pyproject.toml").write_text(_APP.format(version=version("fedloom")))
        config = self.folder / "run.toml"
        config.write_text(f"socket = {json.dumps(str(pipe))}\n")
        self.flwr("run", str(app), NAME, "--run-config", str(config))

    def flwr(self, *words: str) -> Mapping[str, object]:
        """Run a command of Flower's own and return what it says."""
        done = subprocess.run(
            [str(_BIN / "flwr"), *words, "--format", "json"],
            env={**os.environ, **self._environment()},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        try:
            result = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            result = {}
        if done.returncode or not isinstance(result, dict) or not result.get("success"):
            text = " ".join((done.stdout + done.stderr).split())[-400:]
            raise FlowerError(f"`flwr {' '.join(words[:2])}` failed: {text}")
        return result

    def _environment(self) -> dict[str, str]:
        path = f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**QUIET, "FLWR_HOME": str(self.folder / "home"), "PATH": path}


def start_supernode(
    folder: Path, *, server: str, ca: Path, key: Path, worker: Path, name: str = "supernode"
) -> Program:
    """Start a SuperNode that hands messages to the resident worker behind the socket `worker`."""
    programs = folder / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    # All it may start: no other program of Flower is on its path.
    for program, command in (
        ("flower-superexec", f'"{_BIN / "flower-superexec"}"'),
        ("flwr-clientapp", f'"{sys.executable}" -m fedloom.engines.flower.node'),
    ):
        script = programs / program
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o700)
    return start(
        name,
        [
            str(_BIN / "flower-supernode"),
            *("--superlink", server, "--root-certificates", str(ca)),
            *("--auth-supernode-private-key", str(key)),
            *("--host", "127.0.0.1", "--port", str(free_port())),
        ],
        folder=folder,
        environment={
            **QUIET,
            "FLWR_HOME": str(folder / "home"),
            "PATH": f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "FEDLOOM_WORKER": str(worker),
        },
    )


def is_stuck(supernode: Program) -> bool:
    """Return whether a SuperNode only seems to run: after an error it may stay, and do nothing."""
    quiet = time.time() - supernode.log.stat().st_mtime > _STUCK
    return quiet and "ERROR" in supernode.last_words(1)


def wait_for(
    program: Program, port: int, *, host: str = "127.0.0.1", seconds: float = 60.0
) -> None:
    """Wait until a program listens.

    Raises:
        FlowerError: where it ends, or takes too long.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError as error:
            if not program.alive() or time.monotonic() > end:
                raise FlowerError(
                    f"{program.name} does not listen: {program.last_words()}"
                ) from error
            time.sleep(0.1)
