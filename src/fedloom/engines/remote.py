"""Clients at sites: the handshake before round 1, and every round's tasks as envelopes of the wire's own bytes."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedloom.core.metrics import METRICS, MetricTable
from fedloom.core.protocols import (
    Algorithm,
    ClientError,
    ClientFailure,
    ClientId,
    Delivery,
    Profile,
    Spent,
    Task,
)
from fedloom.data.manifest import ClientCounts
from fedloom.engines.codec import MessageCodec
from fedloom.engines.introductions import introduced, plain
from fedloom.engines.parcels import Parcel, Piece, Spool
from fedloom.engines.reported import spent_of
from fedloom.engines.requests import Envelope, NotSent, Requests, Site, TransportDown
from fedloom.engines.sums import Sum, sums_of
from fedloom.engines.transfer import Transfer
from fedloom.secure.ciphers import Directory
from fedloom.secure.messages import Step
from fedloom.secure.settings import SecureSettings
from fedloom.spaces.handshake import SERVER_AND_SITE, agree
from fedloom.wire.format import task_head
from fedloom.wire.wire_settings import WireSettings

_ASIDE = 60.0
"""Seconds for what a site answers without training."""


@dataclass
class SiteRecord:
    """What the server knows of one site."""

    clients: tuple[ClientId, ...] = ()
    last_seen: float = 0.0
    """Seconds since the epoch; 0 if never."""
    download_bytes: int = 0
    upload_bytes: int = 0
    num_absent: int = 0
    last_absence: str = ""


@dataclass
class Remote:
    """Any engine whose clients are elsewhere."""

    algorithm: Algorithm[Any]
    wire: WireSettings
    requests: Requests
    greeting: Mapping[str, Any]
    """Versions, recipe and base model: in every envelope, so that a worker that was started again needs no other."""
    deadline: float
    one_client: bool = False
    """Whether a site is one client, of the name its key was made for."""
    min_sites: int = 0
    """With fewer connected a round waits; 0 never waits."""
    patience: float = 600.0
    """Seconds that it waits."""
    metrics: MetricTable = METRICS
    """What clients may report."""
    secure: SecureSettings | None = None
    """How uploads are added up so that nobody sees one; None: the server receives each."""
    directory: Directory | None = None
    """The sites' public keys, which what they say in a secure sum is signed by."""
    on_change: Callable[["Remote", int], None] = lambda *_: None
    files: Mapping[str, Parcel] = field(default_factory=dict)
    """What each site is handed before it joins, by name; listed in the greeting."""
    folder: Path = field(
        default_factory=lambda: Path(tempfile.gettempdir(), f"fedloom-{os.getpid()}")
    )
    """Where large messages lie while they are sent and fetched; nothing else is in it."""
    connected: Mapping[Site, str] = field(default_factory=dict)
    """Who was there at the last look."""
    sites: dict[Site, SiteRecord] = field(default_factory=dict)
    profiles: dict[ClientId, Profile] = field(default_factory=dict)
    counts: dict[ClientId, ClientCounts] = field(default_factory=dict)
    """What each client holds, in numbers."""
    host: dict[ClientId, Site] = field(default_factory=dict)
    """Where each client is."""
    _refused: dict[Site, tuple[str, str]] = field(default_factory=dict)
    """The connection at which a site was refused, and why: it is greeted again when it connects anew."""

    def meet(self, wanted: Sequence[Site], *, seconds: float, patient: bool = False) -> None:
        """Shake hands with all of `wanted` before round 1.

        Args:
            wanted: Who must come.
            seconds: How long they are waited for.
            patient: Let a site that does not fit be mended and come again, while the others wait.

        Raises:
            ValueError: where one of them does not come, or does not fit; the message names it.
        """
        end = self.requests.clock() + seconds
        while missing := [site for site in wanted if site not in self.sites]:
            here = self._new(missing)
            left = end - self.requests.clock()
            if left <= 0:
                raise ValueError(self._who_is_missing(missing, seconds))
            refused = self._greet(here, seconds=left) if here else {}
            if refused and not patient:
                raise ValueError("; ".join(f"{site}: {why}" for site, why in refused.items()))
            for site, why in refused.items():
                self.requests.on_trouble(
                    f"{site} cannot join: {why}; start it again when that is mended"
                )
            if refused or not here:
                self.requests.sleep(min(2.0 if refused else 0.3, left))
        self.on_change(self, 0)

    def part(self) -> None:
        """Tell everybody that the run has ended; who does not hear it goes on waiting."""
        bye = Envelope({**self.greeting, "kind": "bye"})
        # Who hears it is gone at once, which is no trouble now.
        last = replace(self.requests, grace=0.0, on_trouble=lambda _: None)
        last.exchange(dict.fromkeys(self.look(), bye), seconds=20.0)

    def population(self) -> Mapping[ClientId, Profile]:
        """Return all clients that ever joined; the tasks of one that is gone become failures with its name."""
        return {client: self.profiles[client] for client in sorted(self.profiles)}

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Send each site its tasks in one envelope and yield the answers in task order."""
        codec = MessageCodec(self.algorithm, self.wire, self.metrics)
        self.welcome()
        spool = Spool(self.folder / "sent")
        if self.secure is not None and tasks and tasks[0].kind == "train":
            yield from self._summed(self.secure, tasks, codec, spool)
            return
        bodies = codec.bodies(tasks, joined=spool.joined)
        heads, sizes = list[bytes](), list[int]()
        at: dict[Site, list[int]] = {}
        for i, task in enumerate(tasks):
            body = bodies[id(task.download)]
            heads.append(task_head(task, body))
            sizes.append(len(heads[i]) + len(body))
            at.setdefault(self.host[task.client], []).append(i)
        transfers = {}
        for site, mine in at.items():
            letter = self.letter(site, [(heads[i], bodies[id(tasks[i].download)]) for i in mine])
            pieces, parcels = spool.parted(letter.pieces)
            transfers[site] = Transfer(
                replace(letter, pieces=pieces),
                {"parcels": parcels},
                self.folder / site,
                partial(codec.most_bytes, [tasks[i] for i in mine]),
            )
        answers = self._exchange(transfers)
        # What has arrived is mapped, and stays until it is read.
        shutil.rmtree(self.folder, ignore_errors=True)
        arrived: dict[int, Piece | str] = {}
        spent: dict[int, Spent] = {}
        for site, mine in at.items():
            if isinstance(answers[site], NotSent):
                for i in mine:
                    sizes[i] = 0
            arrived |= dict(zip(mine, answers_of(answers[site], len(mine)), strict=True))
            spent |= dict(zip(mine, spent_of(answers[site], len(mine)), strict=True))
            self.note(site, [arrived[i] for i in mine], sum(sizes[i] for i in mine))
        self.on_change(self, tasks[0].round if tasks else 0)
        for i, task in enumerate(tasks):
            answer = arrived.pop(i)
            if isinstance(answer, str):
                yield Delivery(
                    ClientFailure(task.client, self.named(task.client, answer)), sizes[i]
                )
            else:
                read = codec.receive(task, answer, download_bytes=sizes[i])
                yield replace(read, spent=spent[i])

    def _summed(
        self, secure: SecureSettings, tasks: Sequence[Task], codec: MessageCodec, spool: Spool
    ) -> Iterator[Delivery]:
        """Yield who is absent from the round's sums, and the sums."""
        if self.min_sites:
            sites = [self.host[task.client] for task in tasks]
            needed = min(self.min_sites, len(sites))
            self.requests.wait(sites, needed, seconds=self.patience)
        bodies = codec.bodies(tasks, joined=spool.joined)
        try:
            for one in sums_of(tasks, bodies, codec, secure, self.greeting["identity"]["recipe"]):
                yield from one.deliveries(partial(self._post, one, spool), self.directory)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.on_change(self, tasks[0].round)

    def _post(
        self, one: Sum, spool: Spool, step: Step, messages: Mapping[ClientId, bytes]
    ) -> dict[ClientId, Piece | str]:
        """Return the clients' answers to the messages of one step; a task goes with that which asks for its upload."""
        tasks = {task.client: task for task in one.tasks}
        transfers, sizes = dict[Site, Transfer](), dict[Site, int]()
        for client, message in messages.items():
            site = self.host[client]
            header = {**self.greeting, "kind": "sum", "site": site, "step": step}
            letter, parcels = Envelope(header, [message]), dict[str, Parcel]()
            if step == "upload":
                head = task_head(tasks[client], one.body)
                letter = self.letter(site, [(head, one.body)])
                own, parcels = spool.parted(letter.pieces)
                header = {**letter.header, "sum": len(own)}
                letter = Envelope(header, [*own, message])
                size = len(head) + len(one.body)
                one.downloaded[client] = one.downloaded.get(client, 0) + size
            transfers[site] = Transfer(
                letter, {"parcels": parcels}, self.folder / site, one.most_bytes
            )
            sizes[site] = sum(map(len, letter.pieces)) + sum(
                p.listing.size for p in parcels.values()
            )
        seconds = self.deadline if step == "upload" else min(self.deadline, _ASIDE)
        answers = dict[ClientId, Piece | str]()
        for site, answer in self._transferred(transfers, seconds=seconds).items():
            (found,) = answers_of(answer, 1)
            (client,) = (c for c in messages if self.host[c] == site)
            answers[client] = self.named(client, found) if isinstance(found, str) else found
            self.note(site, [found], sizes[site])
        return answers

    def _exchange(self, transfers: Mapping[Site, Transfer]) -> dict[Site, Envelope | str]:
        """Return every site's answer; while too few are there, wait, and send again what nobody answered."""
        needed = min(self.min_sites, len(transfers))
        answers: dict[Site, Envelope | str] = {}
        while True:
            if needed:
                self.requests.wait(list(transfers), needed, seconds=self.patience)
            due = {
                s: replace(transfer)
                for s, transfer in transfers.items()
                if not isinstance(answers.get(s), Envelope)
            }
            answers |= self._transferred(due, seconds=self.deadline)
            arrived = sum(isinstance(answer, Envelope) for answer in answers.values())
            here = sum(site in self.look() for site in transfers) if arrived < needed else needed
            if here >= needed:
                # Who is there and says no will say so again.
                return answers

    def _transferred(
        self, transfers: Mapping[Site, Transfer], *, seconds: float
    ) -> dict[Site, Envelope | str]:
        return self.requests.exchange(
            {site: transfer.opening() for site, transfer in transfers.items()},
            seconds=seconds,
            then=lambda site, answer: transfers[site].then(answer),
        )

    def _new(self, sites: Sequence[Site]) -> list[Site]:
        """Return who is here and was not met, nor refused since it connected."""
        here = self.look()
        return [
            site
            for site in sites
            if site in here
            and site not in self.sites
            and (site not in self._refused or self._refused[site][0] != here[site])
        ]

    def _who_is_missing(self, missing: Sequence[Site], seconds: float) -> str:
        absent = [site for site in missing if site not in self._refused]
        reasons = [f"{site}: {self._refused[site][1]}" for site in missing if site in self._refused]
        if absent:
            reasons.append(
                f"{', '.join(absent)} did not join within {seconds:g} seconds: start `fedloom join` there,"
                " or raise engine.flower.patience"
            )
        return "; ".join(reasons)

    def look(self) -> Mapping[Site, str]:
        """Return who is connected now."""
        try:
            self.connected = self.requests.transport.sites()
        except TransportDown:
            # The exchange that follows makes a new link, and finds out who is back.
            self.connected = {}
        return self.connected

    def letter(self, site: Site, parts: Sequence[tuple[bytes, Piece]]) -> Envelope:
        """Return one envelope of several tasks; a body they share is in it once."""
        pieces: list[Piece] = []
        where: dict[int, int] = {}
        tasks = []
        for head, body in parts:
            if id(body) not in where:
                where[id(body)] = len(pieces)
                pieces.append(body)
            tasks.append([len(pieces), where[id(body)]])
            pieces.append(head)
        return Envelope({**self.greeting, "kind": "work", "site": site, "tasks": tasks}, pieces)

    def welcome(self) -> None:
        """Shake hands with who joined since; one that does not fit is told so and left out."""
        new = self._new(list(self.look()))
        for site, why in (self._greet(new, seconds=self.deadline) if new else {}).items():
            self.requests.on_trouble(f"{site} cannot join: {why}")

    def _greet(self, sites: Sequence[Site], *, seconds: float) -> dict[Site, str]:
        """Return who was refused, and why."""
        connections = {site: self.connected.get(site, "") for site in sites}
        hellos = {
            s: Transfer(
                Envelope({**self.greeting, "kind": "hello", "site": s}),
                {"files": self.files},
                self.folder / s,
            )
            for s in sites
        }
        refused: dict[Site, str] = {}
        for site, answer in self._transferred(hellos, seconds=seconds).items():
            try:
                self._admit(site, answer)
            except ValueError as error:
                refused[site] = str(error)
                if isinstance(answer, Envelope):
                    self._refused[site] = connections[site], refused[site]
        return refused

    def _admit(self, site: Site, answer: Envelope | str) -> None:
        if isinstance(answer, str):
            raise ValueError(answer)
        header = answer.header
        if "refusal" in header:
            raise ValueError(plain(header["refusal"]))
        try:
            identity = {str(k): plain(v) for k, v in header["identity"].items()}
            agree(self.greeting["identity"], identity, where=SERVER_AND_SITE)
            clients = introduced(header["clients"])
        except ClientError as refusal:
            raise ValueError(str(refusal)) from refusal
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("its introduction is malformed: install the same fedloom") from error
        except ValueError as error:
            raise ValueError(f"its introduction is malformed: {error}") from error
        if self.one_client and clients.keys() != {site}:
            raise ValueError(
                f"its key is that of {site}, but it comes as {', '.join(list(clients)[:3])}:"
                f" start `fedloom join` there with --name {site}"
            )
        for client in clients:
            if self.host.get(client, site) != site:
                raise ValueError(
                    f"client {client} is at {self.host[client]} already: give the site another --name"
                )
        self.sites[site] = SiteRecord(tuple(clients), time.time())
        for client, (profile, counts) in clients.items():
            self.host[client] = site
            self.profiles[client], self.counts[client] = profile, counts

    def named(self, client: ClientId, reason: str) -> str:
        """Return a reason with the site that it is of, where that has another name than the client."""
        site = self.host[client]
        return reason if site == client else f"{site}: {reason}"

    def note(self, site: Site, answers: Sequence[Piece | str], download_bytes: int) -> None:
        """Add to what is known of a site what it was sent and has answered."""
        record = self.sites[site]
        lost = [answer for answer in answers if isinstance(answer, str)]
        record.num_absent += len(lost)
        record.download_bytes += download_bytes
        record.upload_bytes += sum(len(one) for one in answers if not isinstance(one, str))
        if lost:
            record.last_absence = lost[-1]
        if len(lost) < len(answers):
            record.last_seen = time.time()


def answers_of(answer: Envelope | str, number: int) -> list[Piece | str]:
    """Return one answer a task."""
    if isinstance(answer, str):
        return [plain(answer)] * number
    if "refusal" in answer.header:
        return [plain(answer.header["refusal"])] * number
    reasons, pieces = answer.header.get("answers"), iter(answer.pieces)
    wanted = [None] if not isinstance(reasons, list) else reasons
    if len(wanted) != number or wanted.count(None) != len(answer.pieces):
        return [f"sent {len(answer.pieces)} replies to {number} tasks"] * number
    return [next(pieces) if reason is None else plain(reason) for reason in wanted]
