"""The processes that train a client together: started, asked, and started anew where one of them is lost.

The process that speaks to the federation takes no part itself, so that nothing that becomes of the others can stop it: a process
that dies, or all of them taking too long, is a client that is absent. It runs the algorithm, clips, draws noise and chooses
what travels, all of it on whole tensors.
"""

import os
import select
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedloom.client.fast.kernels import choose_kernels
from fedloom.core.protocols import ClientError, Done, Job, Trainer
from fedloom.deploy.rank_messages import RankSettings, read_values, write_values
from fedloom.deploy.site_settings import SiteSettings
from fedloom.engines.flower.pipe import receive, send
from fedloom.engines.flower.processes import Program, start
from fedloom.engines.inprocess import InProcess
from fedloom.recipe_text import to_yaml
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session, watched

_TOGETHER = 5.0
"""Seconds in which what one process refuses is refused by the others too, where it is for the same reason."""


class _Lost(Exception):
    """The processes cannot go on together."""


@dataclass
class Group:
    """A trainer whose work is done by several processes."""

    recipe: Recipe
    site: SiteSettings
    width: int = 1
    _stack: ExitStack = field(default_factory=ExitStack)
    _programs: list[Program] = field(default_factory=list)
    _sockets: list[Path] = field(default_factory=list)
    _private: Path = Path()
    _number: int = 0

    def open(self) -> None:
        """Start the processes, and wait until they have found each other.

        Raises:
            ValueError: with the reason, where one of them cannot.
        """
        try:
            self._start()
            self._ask({"kind": "hello"})
        except (_Lost, OSError) as lost:
            ended = [program for program in self._programs if not program.alive()]
            words = [program.last_words(1) for program in ended[:1]]
            self.close()
            raise ValueError(": ".join([self.recipe.worker.setting, str(lost), *words])) from lost

    def close(self) -> None:
        """End the processes."""
        self._stack.close()
        self._programs, self._sockets = [], []

    def run(self, jobs: Sequence[Job]) -> Sequence[Done]:
        """Return the answers in the order of the jobs.

        Raises:
            ClientError: where a client cannot do its work, or a process is lost.
            ValueError: for work that no client can do.
        """
        client = jobs[0].client if jobs else ""
        if not self._programs:
            try:
                self.open()
            except ValueError as error:
                raise ClientError(f"{client}: {error}") from error
        try:
            return self._run(jobs)
        except (_Lost, OSError) as lost:
            self.close()
            raise ClientError(f"{client}: {lost}; its processes are started anew") from lost

    def _run(self, jobs: Sequence[Job]) -> Sequence[Done]:
        self._number += 1
        asked, done = (self._private / f"{self._number}.{name}" for name in ("jobs", "done"))
        write_values(list(jobs), asked)
        try:
            self._ask({"kind": "work", "jobs": str(asked), "done": str(done)})
            return read_values(done)
        finally:
            asked.unlink()
            done.unlink(missing_ok=True)

    def _start(self) -> None:
        recipe, number = self.recipe, self.recipe.worker.num_processes
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fedloom-"))
        self._private = Path(folder)
        site, text = self._private / "site.json", self._private / "recipe.yaml"
        self.site.write(site)
        text.write_text(to_yaml(recipe))
        threads = max(1, torch.get_num_threads() // number)
        # A process of this run finds the code that its recipe names where this program does.
        places = os.pathsep.join(place or os.getcwd() for place in sys.path)
        environment = {"PYTHONPATH": places} if self.site.imports is None else {}
        if sys.platform == "linux":
            # They talk to each other and to nobody else.
            environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        for rank in range(number):
            file, door = self._private / f"{rank}.json", self._private / f"{rank}"
            meeting = str(self._private / "meeting")
            RankSettings(rank, str(text), str(site), meeting, threads).write(file)
            command = [sys.executable, "-m", "fedloom.deploy.rank", str(file), str(door)]
            logs = self.site.folder / "worker"
            program = start(f"process-{rank}", command, folder=logs, environment=environment)
            self._stack.callback(program.stop)
            self._programs.append(program)
            self._sockets.append(door)

    def _ask(self, header: dict[str, Any]) -> None:
        """Send each process the same words, and wait until all have answered.

        Raises:
            _Lost: where one of them is gone, says what the others do not, or does not answer in time.
        """
        seconds = self.recipe.worker.deadline
        end, errors = time.monotonic() + seconds, list[dict[str, Any]]()
        with ExitStack() as stack:
            waiting = {
                stack.enter_context(self._door(i, end)): i for i in range(len(self._sockets))
            }
            for door, rank in waiting.items():
                with self._while_alive(rank):
                    send(door, header)
            while waiting:
                for door in select.select(list(waiting), [], [], 0.2)[0]:
                    rank = waiting.pop(door)
                    with self._while_alive(rank):
                        answer = receive(door)[0]
                    if answer:
                        errors.append(answer)
                        end = min(end, time.monotonic() + _TOGETHER)
                if waiting and time.monotonic() > end:
                    break
        if errors and not waiting and all(error == errors[0] for error in errors):
            _raise(errors[0])
        if errors:
            raise _Lost(" ".join(errors[0].values()))
        if waiting:
            raise _Lost(f"no answer within {seconds:g} seconds (worker.deadline)")

    @contextmanager
    def _while_alive(self, rank: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _Lost(self._ended(rank)) from error

    def _door(self, rank: int, end: float) -> socket.socket:
        """Return a connection to a process, which may have to load its model before."""
        door = socket.socket(socket.AF_UNIX)
        while True:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                door.connect(str(self._sockets[rank]))
                return door
            for other, program in enumerate(self._programs):
                if not program.alive():
                    door.close()
                    raise _Lost(self._ended(other))
            if time.monotonic() > end:
                door.close()
                raise _Lost(f"process {rank + 1} was not ready in time (worker.deadline)")
            time.sleep(0.1)

    def _ended(self, rank: int) -> str:
        log = self._programs[rank].log
        return f"process {rank + 1} of {len(self._programs)} ended ({log} has its last words)"


def _raise(error: dict[str, Any]) -> None:
    """Raise what all processes say alike."""
    for kind, words in error.items():
        if kind == "absent":
            raise ClientError(words)
        if kind == "refused":
            raise ValueError(words)
        raise _Lost(words)


@contextmanager
def grouped(session: Session, site: SiteSettings) -> Iterator[Session]:
    """Return the session with its clients trained by several processes, for as long as the context lasts."""
    group = group_of(session, site)
    try:
        yield with_trainer(session, group)
    finally:
        group.close()


@dataclass
class SharingOut:
    """Lets a site's clients be trained by several processes; those of an earlier recipe are ended."""

    site: SiteSettings
    _group: Group | None = None

    def __call__(self, session: Session) -> Session:
        """Return the session with its clients trained as its recipe says."""
        self.close()
        if session.recipe.worker.num_processes == 1:
            return session
        self._group = group_of(session, self.site)
        return with_trainer(session, self._group)

    def close(self) -> None:
        """End the processes, if there are any."""
        if self._group is not None:
            self._group.close()
            self._group = None


def group_of(session: Session, site: SiteSettings) -> Group:
    """Return the processes that a session asks for, started.

    Raises:
        ValueError: where they cannot be had.
    """
    recipe = session.recipe
    if given := [name for name in ("data", "model", "trainer") if name in recipe.objects]:
        raise ValueError(
            f"{recipe.worker.setting} needs a recipe that other processes can read, got objects from Python:"
            f" {', '.join(given)}"
        )
    _check_devices(recipe)
    on_cpu = not torch.cuda.is_available() or recipe.model.device == "cpu"
    if on_cpu and recipe.worker.replicas > 1:
        # What `auto` comes to is measured: once, and not by each process.
        kernels = choose_kernels(recipe.local, session.space.model)
        recipe = replace(recipe, local=replace(recipe.local, kernels=kernels))
    group = Group(recipe, site)
    group.open()
    return group


def with_trainer(session: Session, trainer: Trainer) -> Session:
    """Return the session with another trainer, and the guard of its own around it."""
    guarded = watched(trainer, session.space, session.federation, session.recipe)
    engine = session.engine
    assert isinstance(engine, InProcess)
    return replace(
        session, trainer=trainer, watched=guarded, engine=replace(engine, trainer=guarded)
    )


def _check_devices(recipe: Recipe) -> None:
    worker, device = recipe.worker, recipe.model.device
    if device.startswith("cuda:"):
        raise ValueError(
            f"model.device must be auto, cpu or cuda for {worker.setting}, whose processes have a device each, got {device}"
        )
    found = torch.cuda.device_count()
    if device != "cpu" and torch.cuda.is_available() and found < worker.num_processes:
        raise ValueError(
            f"{worker.setting} needs as many CUDA devices, this machine has {found}: set model.device=cpu, or fewer"
        )
