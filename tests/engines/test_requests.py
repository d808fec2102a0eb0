"""Envelopes to sites: deadlines, lost and late sites, and links that are made anew, on a transport and a clock of its own."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import pytest

from fedloom.engines.requests import Envelope, NotSent, Outage, Requests, Retryable, TransportDown

HELLO = Envelope({"say": "hello"})


@dataclass
class Office:
    """A transport whose answers come after as many seconds as `takes` says; None: never."""

    takes: dict[str, float | None]
    now: float = 0.0
    connection: dict[str, str] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    reopened: int = 0
    down_at: float | None = None
    gone: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)
    due: dict[str, tuple[str, float | None, float]] = field(default_factory=dict)
    events: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def sites(self) -> Mapping[str, str]:
        self._check()
        return {s: self.connection.get(s, "1") for s in self.takes if s not in self.gone}

    def send(self, envelopes: Mapping[str, Envelope], *, seconds: float) -> Mapping[str, str]:
        self._check()
        tickets = {}
        for site in envelopes:
            tickets[site] = f"{site}-{len(self.sent)}"
            self.sent.append(site)
            takes = self.takes[site]
            when = None if takes is None else self.now + takes
            self.due[tickets[site]] = site, when, self.now + seconds
        return tickets

    def collect(self, tickets: Collection[str]) -> Mapping[str, Envelope | str]:
        self._check()
        out: dict[str, Envelope | str] = {}
        for ticket in tickets:
            site, when, expires = self.due[ticket]
            if site in self.lost:
                out[ticket] = self.lost.pop(site)
            elif when is not None and when <= self.now:
                out[ticket] = Envelope({"from": site})
            elif self.now >= expires:
                out[ticket] = "the message has expired"
        return out

    def reopen(self) -> None:
        self.reopened += 1
        self.down_at = None

    def _check(self) -> None:
        if self.down_at is not None and self.now >= self.down_at:
            raise TransportDown("the link is gone")

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for event in [event for event in self.events if event[0] <= self.now]:
            self.events.remove(event)
            event[1]()


def requests(office: Office, grace: float = 90.0) -> Requests:
    return Requests(office, grace, clock=lambda: office.now, sleep=office.sleep)


def test_every_site_answers_once():
    office = Office({"a": 1.0, "b": 3.0})
    answers = requests(office).exchange({"a": HELLO, "b": HELLO}, seconds=10)
    assert {site: answer.header for site, answer in answers.items() if isinstance(answer, Envelope)}
    assert sorted(office.sent) == ["a", "b"]
    assert 3.0 <= office.now < 4.0


def test_who_is_not_connected_is_absent_at_once():
    office = Office({"a": 1.0}, gone={"a"})
    answers = requests(office).exchange({"a": HELLO, "b": HELLO}, seconds=100)
    assert "not connected" in str(answers["a"])
    assert "not connected" in str(answers["b"])
    assert office.now == 0


def test_a_slow_site_is_absent_at_the_deadline_and_not_asked_again_before_it_is_done():
    office = Office({"a": 1.0, "slow": 25.0})
    transport = requests(office)
    first = transport.exchange({"a": HELLO, "slow": HELLO}, seconds=10)
    assert "no answer within 10 seconds" in str(first["slow"])
    assert isinstance(first["a"], Envelope)
    second = transport.exchange({"a": HELLO, "slow": HELLO}, seconds=10)
    assert "still at work for an earlier round" in str(second["slow"])
    office.now = 30.0
    office.takes["slow"] = 2.0
    third = transport.exchange({"a": HELLO, "slow": HELLO}, seconds=10)
    assert isinstance(third["slow"], Envelope)
    assert office.sent.count("slow") == 2


def test_a_lost_letter_is_an_absence_with_its_reason():
    office = Office({"a": None}, lost={"a": "its worker died"})
    assert requests(office).exchange({"a": HELLO}, seconds=10) == {"a": "its worker died"}


def test_a_site_that_connects_anew_gets_its_letter_again():
    office = Office({"a": None})

    def restart() -> None:
        office.connection["a"] = "2"
        office.takes["a"] = 1.0

    office.events.append((5.0, restart))
    answers = requests(office).exchange({"a": HELLO}, seconds=60)
    assert isinstance(answers["a"], Envelope)
    assert office.sent == ["a", "a"]
    assert office.now < 8


def test_a_link_that_dies_is_made_anew_and_what_was_due_is_sent_again():
    office = Office({"a": 1.0, "b": 6.0}, down_at=3.0)
    said: list[str] = []
    transport = requests(office)
    transport.on_trouble = said.append
    answers = transport.exchange({"a": HELLO, "b": HELLO}, seconds=60)
    assert all(isinstance(answer, Envelope) for answer in answers.values())
    assert office.reopened == 1
    assert office.sent == ["a", "b", "b"]
    assert "the link is gone" in said[0]


def test_after_a_new_link_sites_have_time_to_come_back_and_no_more():
    office = Office({"a": 1.0, "b": 1.0}, down_at=0.0, gone={"a", "b"})
    office.events.append((20.0, lambda: office.gone.discard("a")))
    answers = requests(office, grace=30.0).exchange({"a": HELLO, "b": HELLO}, seconds=100)
    assert isinstance(answers["a"], Envelope)
    assert "not connected" in str(answers["b"])
    assert 30 <= office.now < 32


def test_a_site_that_is_gone_in_the_middle_has_time_to_come_back():
    office = Office({"a": 1.0}, lost={"a": Retryable("its node is gone")})
    said: list[str] = []
    transport = requests(office)
    transport.on_trouble = said.append
    office.events.append((0.01, lambda: office.gone.add("a")))
    office.events.append((40.0, lambda: office.gone.discard("a")))
    answers = transport.exchange({"a": HELLO}, seconds=600)
    assert isinstance(answers["a"], Envelope)
    assert office.sent == ["a", "a"]
    assert said == ["a: its node is gone; waiting 90 seconds for it"]


def test_a_site_that_does_not_come_back_is_absent_for_good():
    office = Office({"a": 1.0}, lost={"a": Retryable("its node is gone")})
    office.events.append((0.01, lambda: office.gone.add("a")))
    answers = requests(office).exchange({"a": HELLO}, seconds=600)
    assert "not connected" in str(answers["a"])
    assert 90 <= office.now < 92


def test_a_letter_that_never_went_out_says_so():
    office = Office({"a": 1.0}, gone={"b"})
    out = requests(office).exchange({"a": HELLO, "b": HELLO}, seconds=10)
    assert isinstance(out["a"], Envelope)
    assert isinstance(out["b"], NotSent)


def test_an_outage_is_waited_for_and_said_once():
    office = Office({"a": 1.0, "b": 1.0}, gone={"a", "b"})
    office.events = [(20.0, office.gone.clear)]
    said: list[str] = []
    box = requests(office)
    box.on_trouble = said.append
    box.wait(["a", "b"], 1, seconds=60)
    assert 20 <= office.now < 21
    assert said == ["waiting up to 60 seconds for a, b", "going on"]


def test_enough_sites_are_not_waited_for():
    office = Office({"a": 1.0, "b": 1.0}, gone={"b"})
    requests(office).wait(["a", "b"], 1, seconds=60)
    assert office.now == 0
    with pytest.raises(
        Outage, match=r"^b did not come back within 5 seconds \(run\.patience_seconds\)"
    ):
        requests(office).wait(["a", "b"], 2, seconds=5)


def test_a_link_that_is_down_is_made_anew_while_waiting():
    office = Office({"a": 1.0}, down_at=0.0)
    requests(office).wait(["a"], 1, seconds=60)
    assert office.reopened == 1
