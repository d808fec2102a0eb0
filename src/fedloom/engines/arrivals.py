"""Sites that nobody waits for: each is asked by itself, and answers when it is done, beside whatever the others do."""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from fedloom.core.protocols import ClientFailure, ClientId, Delivery, Profile, Reply, Task
from fedloom.engines.codec import MessageCodec
from fedloom.engines.parcels import Spool
from fedloom.engines.remote import Remote, answers_of
from fedloom.engines.reported import spent_of
from fedloom.engines.requests import Exchange, NotSent, Then
from fedloom.engines.transfer import Transfer
from fedloom.wire.format import task_head


@dataclass(frozen=True)
class _Asked:
    """A task that a site is at."""

    task: Task
    size: int
    """Bytes of its message."""
    exchange: Exchange
    made: Callable[[Reply], Reply]
    sent: Path
    """Where large messages lie that it shares with others of one call."""


@dataclass
class Arrivals:
    """Sites of one client each, as an engine whose clients answer in their own time, see `core.protocols.Arriving`.

    What answers before anybody asks for it waits here. A site is at one thing at a time, so that an evaluation comes once all
    are done with their training.
    """

    remote: Remote
    _open: dict[ClientId, _Asked] = field(default_factory=dict)
    _arrived: list[Delivery] = field(default_factory=list)
    _codec: MessageCodec = field(init=False)
    _folder: Path = field(init=False)
    _calls: int = 0
    _round: int = 0

    def __post_init__(self) -> None:
        """Let messages lie beside those of rounds, which are removed after each."""
        remote = self.remote
        self._codec = MessageCodec(remote.algorithm, remote.wire, remote.metrics)
        self._folder = remote.folder.with_name(f"{remote.folder.name}-training")
        # What a server that was killed left: nobody is at it any more.
        self._clear()

    def population(self) -> Mapping[ClientId, Profile]:
        """Return all clients that ever joined."""
        return self.remote.population()

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Yield the answers in task order, once nobody trains any more."""
        self.settle()
        yield from self.remote.run(tasks)

    @property
    def training(self) -> Collection[ClientId]:
        """Return who was asked and whose answer nobody has taken yet."""
        return {*self._open, *(delivery.answer.client for delivery in self._arrived)}

    def begin(self, tasks: Sequence[Task], made: Callable[[Reply], Reply]) -> None:
        """Send each site its task and return, without an answer; who joined meanwhile is greeted."""
        self._wait()
        self.remote.welcome()
        self._calls, self._round = self._calls + 1, tasks[0].round
        sent = self._folder / f"sent-{self._calls}"
        spool, host = Spool(sent), self.remote.host
        bodies = self._codec.bodies(tasks, joined=spool.joined)
        for task in tasks:
            site, body = host[task.client], bodies[id(task.download)]
            head = task_head(task, body)
            letter = self.remote.letter(site, [(head, body)])
            pieces, parcels = spool.parted(letter.pieces)
            transfer = Transfer(
                replace(letter, pieces=pieces),
                {"parcels": parcels},
                self._folder / site,
                partial(self._codec.most_bytes, [task]),
            )
            exchange = self.remote.requests.begin(
                {site: transfer.opening()},
                seconds=self.remote.deadline,
                then=_said_to(transfer),
            )
            self._open[task.client] = _Asked(task, len(head) + len(body), exchange, made, sent)
        self._look()

    def arrival(self) -> Delivery:
        """Return what came of a task, the first that did; wait for it where it is not there yet."""
        assert self.training, "nobody was asked"
        self._until(lambda: bool(self._arrived))
        delivery = self._arrived.pop(0)
        self.remote.on_change(self.remote, self._round)
        return delivery

    def too_few(self, num_replies: int) -> bool:
        """Return whether there are fewer replies than `min_sites` because sites were gone; who has waited till they came back.

        Raises:
            Outage: where that took too long.
        """
        if num_replies >= self._needed or self._num_here() >= self._needed:
            # Who is there and says no will say so again.
            return False
        self._wait()
        return True

    def part(self) -> None:
        """Tell everybody that the run has ended, once they are done."""
        self.settle()
        self._clear()
        self.remote.part()

    def _clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def settle(self) -> None:
        """Wait until nobody trains any more; the answers are for `arrival`."""
        self._until(lambda: not self._open)

    @property
    def _needed(self) -> int:
        return min(self.remote.min_sites, len(self.remote.host))

    def _num_here(self) -> int:
        return len({*self.remote.look()} & {*self.remote.host.values()})

    def _wait(self) -> None:
        if self._needed:
            sites = [*self.remote.host.values()]
            self.remote.requests.wait(sites, self._needed, seconds=self.remote.patience)

    def _until(self, true: Callable[[], bool]) -> None:
        pause = 0.02
        while not true():
            if self._look():
                pause = 0.02
            elif not true():
                self.remote.requests.sleep(pause)
                pause = min(pause * 1.5, 0.5)

    def _look(self) -> bool:
        """Take what is there, and return whether anything was."""
        arrived = self.remote.requests.turn([asked.exchange for asked in self._open.values()])
        ended = [client for client, asked in self._open.items() if not asked.exchange.open()]
        self._arrived += [self._taken(client) for client in ended]
        return arrived or bool(ended)

    def _taken(self, client: ClientId) -> Delivery:
        """Return what came of a client's task; nothing of its messages is left."""
        asked, site = self._open.pop(client), self.remote.host[client]
        answer = asked.exchange.out[site]
        shutil.rmtree(self._folder / site, ignore_errors=True)
        if all(other.sent != asked.sent for other in self._open.values()):
            shutil.rmtree(asked.sent, ignore_errors=True)
        size = 0 if isinstance(answer, NotSent) else asked.size
        ((found,), (spent,)) = answers_of(answer, 1), spent_of(answer, 1)
        self.remote.note(site, [found], size)
        if isinstance(found, str):
            return Delivery(ClientFailure(client, self.remote.named(client, found)), size)
        read = self._codec.receive(asked.task, found, download_bytes=size)
        whole = asked.made(read.answer) if isinstance(read.answer, Reply) else read.answer
        return replace(read, answer=whole, spent=spent)


def _said_to(transfer: Transfer) -> Then:
    return lambda _, answer: transfer.then(answer)
