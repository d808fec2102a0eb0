"""The two programs of a site, kept running by a process that itself loads no torch: worker and SuperNode."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from fedloom.deploy.site_settings import SiteSettings
from fedloom.engines.flower.processes import Keeper, Program, start
from fedloom.engines.flower.programs import is_stuck, start_supernode


@contextmanager
def resident(settings: SiteSettings, private: Path, logs: Path, console: Console) -> Iterator[Path]:
    """Keep a site's worker running; yield its socket."""
    private.mkdir(mode=0o700)
    file, socket = private / "site.json", private / "worker"
    settings.write(file)
    command = [sys.executable, "-m", "fedloom.deploy.worker", str(file), str(socket)]
    # A node of this run finds the code that its recipe names where this program does.
    places = os.pathsep.join(place or os.getcwd() for place in sys.path)
    environment = {"PYTHONPATH": places} if settings.imports is None else {}
    keeper = Keeper(
        lambda: start("worker", command, folder=logs / settings.name, environment=environment),
        on_restart=lambda ended: _say_ended(console, settings.name, ended),
    )
    keeper.start()
    try:
        yield socket
    finally:
        keeper.stop()


@contextmanager
def supernode(folder: Path, server: str, site_key: Path, worker: Path) -> Iterator[Keeper]:
    """Keep a SuperNode running that hands messages to the worker behind a socket."""

    def launch() -> Program:
        return start_supernode(
            folder,
            server=server,
            ca=site_key / "ca.crt",
            key=site_key / "node.key",
            worker=worker,
        )

    keeper = Keeper(launch, stuck=is_stuck)
    keeper.start()
    try:
        yield keeper
    finally:
        keeper.stop()


def _say_ended(console: Console, name: str, ended: Program) -> None:
    message = f"the worker of {name} ended and is started again; {ended.log} has its last words"
    console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
