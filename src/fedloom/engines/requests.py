"""Envelopes to sites and back: who is connected, what is due, what became of it when a link or a site goes down."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Site = str
Ticket = str
LATE = 4.0
"""Deadlines for which a late answer is waited: of no use itself, it says that its site is free again."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What travels between server and site: a header of plain values, and bytes."""

    header: Mapping[str, Any]
    pieces: Sequence[bytes | memoryview] = ()


@dataclass(frozen=True, slots=True)
class Next:
    """What an answer asks for: another envelope to the same site."""

    envelope: Envelope


Then = Callable[["Site", Envelope], Envelope | Next | str]
"""An answer to what comes of it: itself, the next envelope, or the reason why it is none."""


class TransportDown(ConnectionError):
    """The link to all sites is gone; `reopen` makes a new one."""


class Transport(Protocol):
    """Carries envelopes; every method may raise TransportDown."""

    def sites(self) -> Mapping[Site, str]:
        """Return who is connected now, each with a word that changes when it connects anew."""
        ...

    def send(self, envelopes: Mapping[Site, Envelope], *, seconds: float) -> Mapping[Site, Ticket]:
        """Send an envelope to each; after that many seconds it counts as lost."""
        ...

    def collect(self, tickets: Collection[Ticket]) -> Mapping[Ticket, Envelope | str]:
        """Return the answers that are here; of an envelope that is lost, the reason."""
        ...

    def reopen(self) -> None:
        """Make a new link, which knows none of the tickets before."""
        ...


class Retryable(str):
    """Why an envelope is lost where its site may come back, and then gets it again."""

    __slots__ = ()


class NotSent(str):
    """Why an envelope never went out: nobody was charged for it."""

    __slots__ = ()


class Outage(ValueError):
    """Too few sites are there, and none came back in time; the round they were wanted for is not spent."""


@dataclass
class _Sent:
    ticket: Ticket
    connection: str


@dataclass
class Exchange:
    """An envelope to each of some sites, and what became of it so far."""

    envelopes: dict[Site, Envelope]
    """What is to be said to each now."""
    then: Then
    seconds: float
    end: float
    missing_until: float
    """Until then, who is not connected is waited for."""
    sent: dict[Site, _Sent] = field(default_factory=dict)
    out: dict[Site, Envelope | str] = field(default_factory=dict)
    """Last answers, or the reasons why there are none."""

    def open(self) -> list[Site]:
        """Return who has not given its last answer, nor was given up."""
        return [site for site in self.envelopes if site not in self.out]


@dataclass
class Requests:
    """Exchanges envelopes with many sites, each by a deadline."""

    transport: Transport
    grace: float = 90.0
    """Seconds that sites have to come back after they, or the link, went down."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    on_trouble: Callable[[str], None] = lambda _: None
    _late: dict[Site, _Sent] = field(default_factory=dict)
    _open: list[Exchange] = field(default_factory=list)
    """All that are not ended: a link that is made anew knows none of their tickets."""

    def exchange(
        self,
        envelopes: Mapping[Site, Envelope],
        *,
        seconds: float,
        then: Then = lambda _, answer: answer,
    ) -> dict[Site, Envelope | str]:
        """Return every site's answer, or the reason why there is none.

        An envelope to a site that connects anew, or whose link is made anew, is sent again: tasks can be repeated.

        Args:
            envelopes: The first one to each site.
            seconds: By when each has given its last answer.
            then: What each answer leads to.
        """
        it, pause = self.begin(envelopes, seconds=seconds, then=then), 0.02
        while it.open():
            pause = 0.02 if self.turn([it]) else pause
            if it.open():
                self.sleep(min(pause, max(it.end - self.clock(), 0.01)))
                pause = min(pause * 1.5, 0.5)
        return it.out

    def begin(
        self,
        envelopes: Mapping[Site, Envelope],
        *,
        seconds: float,
        then: Then = lambda _, answer: answer,
    ) -> Exchange:
        """Return an exchange that goes on at every `turn`; its arguments are those of `exchange`."""
        now = self.clock()
        self._open.append(Exchange(dict(envelopes), then, seconds, now + seconds, now))
        return self._open[-1]

    def turn(self, exchanges: Sequence[Exchange]) -> bool:
        """Send what is due, take what is there and give up what is overdue; return whether anything arrived."""
        arrived = False
        try:
            connected = self._connected()
            self._forget_answered()
            for it in exchanges:
                self._send(it, connected)
                arrived |= self._collect(it)
        except TransportDown as error:
            self._reopen(error)
            return False
        now = self.clock()
        for it in exchanges:
            self._give_up(it, now)
        self._open[:] = [it for it in self._open if it.open()]
        return arrived

    def _reopen(self, error: TransportDown) -> None:
        self.on_trouble(f"{error}; making a new link")
        self.transport.reopen()
        self._late.clear()
        for it in self._open:
            it.sent.clear()
            it.missing_until = self.clock() + self.grace

    def wait(self, wanted: Collection[Site], number: int, *, seconds: float) -> None:
        """Return when so many of `wanted` are connected, and not at work any more on what was given up.

        Raises:
            Outage: where that takes longer than `seconds`; the message names who is missing.
        """
        end, is_reported = self.clock() + seconds, False
        while len(missing := self._missing(wanted)) > len(wanted) - number:
            names = ", ".join(missing)
            if self.clock() >= end:
                raise Outage(
                    f"{names} did not come back within {seconds:g} seconds (run.patience_seconds), so the run stops"
                    " here, no round is spent on it: `fedloom resume` goes on when they are there"
                )
            if not is_reported:
                self.on_trouble(f"waiting up to {seconds:g} seconds for {names}")
                is_reported = True
            self.sleep(0.5)
        if is_reported:
            self.on_trouble("going on")

    def _missing(self, wanted: Collection[Site]) -> list[Site]:
        try:
            connected = self._connected()
            self._forget_answered()
        except TransportDown as error:
            self._reopen(error)
            return list(wanted)
        return [site for site in wanted if site not in connected or site in self._late]

    def _connected(self) -> Mapping[Site, str]:
        connected = self.transport.sites()
        for waiting in (*(it.sent for it in self._open), self._late):
            for site, one in list(waiting.items()):
                if site in connected and connected[site] != one.connection:
                    # It was started again and knows nothing of this envelope.
                    del waiting[site]
        return connected

    def _send(self, it: Exchange, connected: Mapping[Site, str]) -> None:
        ready = {}
        for site in it.open():
            if site in it.sent or site not in connected:
                continue
            if site in self._late:
                it.out[site] = NotSent(
                    "still at work for an earlier round; engine.flower.deadline is too short for it"
                )
            else:
                ready[site] = it.envelopes[site]
        if ready:
            seconds = max(it.end - self.clock(), 1.0) + LATE * it.seconds
            for site, ticket in self.transport.send(ready, seconds=seconds).items():
                it.sent[site] = _Sent(ticket, connected[site])

    def _collect(self, it: Exchange) -> bool:
        of = {one.ticket: site for site, one in it.sent.items() if site not in it.out}
        arrived = self.transport.collect(list(of)) if of else {}
        for ticket, answer in arrived.items():
            site = of[ticket]
            if isinstance(answer, Retryable):
                del it.sent[site]
                it.missing_until = max(it.missing_until, self.clock() + self.grace)
                self.on_trouble(f"{site}: {answer}; waiting {self.grace:g} seconds for it")
                continue
            found = answer if isinstance(answer, str) else it.then(site, answer)
            if isinstance(found, Next):
                it.envelopes[site] = found.envelope
                del it.sent[site]
                it.missing_until = max(it.missing_until, self.clock() + self.grace)
            else:
                it.out[site] = found
        return bool(arrived)

    def _forget_answered(self) -> None:
        of = {one.ticket: site for site, one in self._late.items()}
        for ticket in self.transport.collect(list(of)) if of else {}:
            del self._late[of[ticket]]

    def _give_up(self, it: Exchange, now: float) -> None:
        for site in it.open():
            if site not in it.sent and now >= min(it.missing_until, it.end):
                it.out[site] = NotSent(
                    "not connected; check `fedloom join` at the site and its network"
                )
            elif now >= it.end:
                it.out[site] = f"no answer within {it.seconds:g} seconds (engine.flower.deadline)"
                self._late[site] = it.sent[site]
