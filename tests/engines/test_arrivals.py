"""Sites that answer in their own time, as functions on a clock of the test's own."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engines.test_remote import DOWN, GREETING, Office, Talk, site, tasks

from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.protocols import Arriving, ClientFailure, Delivery, Payload, Reply, Task
from fedloom.engines.arrivals import Arrivals
from fedloom.engines.remote import Remote
from fedloom.engines.requests import Envelope, Outage, Requests, TransportDown
from fedloom.rounds.buffered import buffered
from fedloom.rounds.buffered_sites import advance_arriving
from fedloom.rounds.loop import begin
from fedloom.server.buffering import Buffered
from fedloom.server.samplers import Full
from fedloom.wire.wire_settings import WireSettings

LARGE: Payload = {"params": {"w": torch.arange(60_000, dtype=torch.float32)}}


@dataclass
class Clocked(Office):
    """Sites whose answers to tasks come after as many seconds as `takes` says."""

    takes: dict[str, float] = field(default_factory=dict)
    now: float = 0.0
    gone: set[str] = field(default_factory=set)
    down: bool = False
    sent: list[str] = field(default_factory=list)
    _due: dict[str, float] = field(default_factory=dict)

    def sites(self) -> Mapping[str, str]:
        if self.down:
            raise TransportDown("the link is gone")
        return {s: word for s, word in super().sites().items() if s not in self.gone}

    def send(self, envelopes: Mapping[str, Envelope], *, seconds: float) -> Mapping[str, str]:
        tickets = super().send(envelopes, seconds=seconds)
        for name, ticket in tickets.items():
            works = envelopes[name].header["kind"] == "work"
            self.sent += [name] if works else []
            self._due[ticket] = self.now + (self.takes[name] if works else 0.0)
        return tickets

    def collect(self, tickets: Collection[str]) -> Mapping[str, Envelope | str]:
        return super().collect([ticket for ticket in tickets if self._due[ticket] <= self.now])

    def reopen(self) -> None:
        self.down = False

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def arrivals(folder: Path, takes: Mapping[str, float], **talks: Talk) -> tuple[Arrivals, Clocked]:
    """Return three sites that have been met, or those that are given."""
    talks = talks or {name: site(name) for name in takes}
    office = Clocked(dict(talks), takes=dict(takes))
    requests = Requests(office, clock=lambda: office.now, sleep=office.sleep)
    remote = Remote(
        FedAvg(), WireSettings(), requests, GREETING, deadline=30.0, folder=folder / "messages"
    )
    remote.meet([*talks], seconds=10)
    return Arrivals(remote), office


def as_it_is(reply: Reply) -> Reply:
    return reply


def who(delivery: Delivery) -> str:
    return delivery.answer.client


def test_answers_come_one_by_one_in_the_order_in_which_sites_are_done(tmp_path: Path) -> None:
    engine, office = arrivals(tmp_path, {"a": 5.0, "b": 1.0, "c": 2.5})
    assert isinstance(engine, Arriving)
    changed: list[int] = []
    engine.remote.on_change = lambda _, round: changed.append(round)
    engine.begin(tasks("a", "b", "c"), as_it_is)
    assert engine.training == {"a", "b", "c"}
    first = engine.arrival()
    assert (who(first), engine.training) == ("b", {"a", "c"})
    assert 1.0 <= office.now < 2.5
    assert first.upload_bytes > 0 < first.download_bytes
    # It is asked again while the others are still at work, and is done before one of them. Who came late is let in.
    office.talks["d"] = site("d")
    engine.begin(tasks("b"), lambda reply: replace(reply, metrics={"loss": 1.0}))
    assert "d" in engine.population()
    second, third = engine.arrival(), engine.arrival()
    assert {who(second), who(third)} == {"b", "c"}
    made = second if who(second) == "b" else third
    assert isinstance(made.answer, Reply)
    assert made.answer.metrics == {"loss": 1.0}
    assert who(engine.arrival()) == "a"
    assert engine.training == set()
    assert changed == [1] * 4


def test_a_site_that_is_gone_is_a_failure_and_nobody_waits_for_it(tmp_path: Path) -> None:
    engine, office = arrivals(tmp_path, {"a": 5.0, "b": 1.0})
    office.gone.add("b")
    engine.begin(tasks("a", "b"), as_it_is)
    lost = engine.arrival()
    assert isinstance(lost.answer, ClientFailure)
    assert "not connected" in lost.answer.reason
    assert (who(lost), lost.download_bytes, office.now) == ("b", 0, 0.0)
    assert engine.remote.sites["b"].num_absent == 1
    assert who(engine.arrival()) == "a"


def test_a_site_beyond_the_deadline_is_a_failure_and_is_not_asked_before_it_is_done(
    tmp_path: Path,
) -> None:
    engine, office = arrivals(tmp_path, {"a": 40.0})
    engine.begin(tasks("a"), as_it_is)
    late = engine.arrival()
    assert isinstance(late.answer, ClientFailure)
    assert "no answer within 30 seconds" in late.answer.reason
    engine.begin(tasks("a"), as_it_is)
    again = engine.arrival()
    assert isinstance(again.answer, ClientFailure)
    assert "still at work" in again.answer.reason
    office.now, office.takes = 50.0, {"a": 1.0}
    engine.begin(tasks("a"), as_it_is)
    assert isinstance(engine.arrival().answer, Reply)


def test_no_step_is_spent_on_sites_that_are_all_at_work_beyond_the_deadline(tmp_path: Path) -> None:
    engine, office = arrivals(tmp_path, {"a": 40.0})
    engine.remote.min_sites = 1
    for number in (1, 2):
        engine.begin(tasks("a"), as_it_is)
        late = engine.arrival()
        assert isinstance(late.answer, ClientFailure)
        assert "no answer within 30 seconds" in late.answer.reason
        assert (office.sent, int(office.now) // 10) == (["a"] * number, 4 * number - 1)


def test_who_connects_anew_and_whose_link_is_made_anew_is_asked_again(tmp_path: Path) -> None:
    engine, office = arrivals(tmp_path, {"a": 4.0, "b": 20.0, "c": 21.0})
    engine.begin(tasks("a", "b", "c"), as_it_is)
    office.connection["b"] = "anew"
    assert who(engine.arrival()) == "a"
    assert office.sent == ["a", "b", "c", "b"]
    # One site is asked while others are at work: their tickets are lost with the link as well.
    office.down = True
    list(engine.remote.run(tasks("a")))
    assert {who(engine.arrival()), who(engine.arrival())} == {"b", "c"}
    assert office.sent[4:] == ["a", "b", "c"]


def test_what_everybody_is_asked_waits_for_who_trains_and_their_answers_are_kept(
    tmp_path: Path,
) -> None:
    engine, office = arrivals(tmp_path, {"a": 9.0, "b": 1.0})
    engine.begin(tasks("a", "b"), as_it_is)
    asked = [Task("train", 2, "a", 0, {}, LARGE)]
    assert [who(delivery) for delivery in engine.run(asked)] == ["a"]
    assert office.now >= 18.0
    assert engine.training == {"a", "b"}
    assert [who(engine.arrival()), who(engine.arrival())] == ["b", "a"]


def test_messages_that_wait_on_the_disk_are_gone_with_the_last_who_shares_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom.engines.parcels.FRAME", 100_000)
    left = tmp_path / "messages-training" / "sent-7" / "of a killed server"
    left.parent.mkdir(parents=True)
    left.touch()
    engine, office = arrivals(tmp_path, {"a": 1.0, "b": 2.0})
    engine.begin([Task("train", 1, client, 0, {}, LARGE) for client in "ab"], as_it_is)
    spooled = tmp_path / "messages-training"
    assert not [*spooled.rglob("of a killed server")]
    assert who(engine.arrival()) == "a"
    assert [*spooled.rglob("*")]
    assert who(engine.arrival()) == "b"
    assert not [path for path in spooled.rglob("*") if path.is_file()]
    office.gone = {"a", "b"}
    engine.part()
    assert not spooled.exists()


def test_with_too_few_sites_it_waits_and_ends_where_nobody_comes(tmp_path: Path) -> None:
    engine, office = arrivals(tmp_path, {"a": 1.0, "b": 1.0})
    engine.remote.min_sites, engine.remote.patience = 2, 20.0
    assert not engine.too_few(2)
    # Both are there: what one of them answers it would answer again.
    assert not engine.too_few(1)
    office.gone.add("b")
    with pytest.raises(Outage, match="b did not come back within 20 seconds"):
        engine.too_few(1)
    back = office.sleep

    def comes_back(seconds: float) -> None:
        back(seconds)
        office.gone.clear()

    engine.remote.requests.sleep = comes_back
    assert engine.too_few(1)


def test_a_step_waits_for_sites_that_were_gone_and_asks_them_again(tmp_path: Path) -> None:
    honest, lost = site("b"), ["it went"]

    def goes_once(envelope: Envelope) -> Envelope | str:
        if envelope.header["kind"] == "work" and lost:
            office.gone.add("b")
            return lost.pop()
        return honest(envelope)

    engine, office = arrivals(tmp_path, {"a": 1.0, "b": 1.0}, a=site("a"), b=goes_once)
    engine.remote.min_sites, engine.remote.patience = 2, 20.0
    passes, returns = office.sleep, 10.0

    def sleep(seconds: float) -> None:
        passes(seconds)
        if office.now >= returns:
            office.gone.clear()

    engine.remote.requests.sleep = sleep
    run = buffered(begin(FedAvg(), DOWN["params"], 0))
    terms: dict[str, Any] = {
        "mode": Buffered(2),
        "population": engine.population(),
        "sampler": Full(),
    }
    run, line, failures = advance_arriving(run, FedAvg(), engine, **terms)
    assert (line["comm/num_replies"], failures) == (2, [])
    assert office.sent == ["a", "b", "b"]
    # Of the next step nobody begins before enough are there.
    returns = office.now + 10
    office.gone.add("a")
    run, line, failures = advance_arriving(run, FedAvg(), engine, **terms)
    assert (line["comm/num_replies"], failures) == (2, [])
    assert engine.remote.sites["a"].num_absent == 0
