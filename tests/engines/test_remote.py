"""The handshake and the rounds of an engine whose clients are elsewhere, with sites that are functions."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.protocols import ClientFailure, Payload, Reply, Task
from fedloom.engines.remote import Remote
from fedloom.engines.requests import Envelope, Outage, Requests, Retryable
from fedloom.wire.format import decode_task, encode_reply
from fedloom.wire.wire_settings import WireSettings

IDENTITY = {"fedloom": "1", "wire": "1", "recipe": "r", "base": "b"}
GREETING = {"recipe": "name: x", "identity": IDENTITY}
COUNTS = {
    "train": 4,
    "validation": 1,
    "test": 1,
    "rows": 4,
    "tokens": 9,
    "target_tokens": 5,
    "labels": {},
    "num_values": {},
}
DOWN: Payload = {"params": {"w": torch.zeros(3)}}
Talk = Callable[[Envelope], Envelope | str]


@dataclass
class Office:
    """Hands each envelope to its site's function at once."""

    talks: dict[str, Talk]
    connection: dict[str, str] = field(default_factory=dict)
    _answers: dict[str, Envelope | str] = field(default_factory=dict)
    _number: int = 0

    def sites(self) -> Mapping[str, str]:
        return {site: self.connection.get(site, "") for site in self.talks}

    def send(self, envelopes: Mapping[str, Envelope], *, seconds: float) -> Mapping[str, str]:
        tickets = {}
        for site, envelope in envelopes.items():
            self._number += 1
            tickets[site] = str(self._number)
            self._answers[tickets[site]] = self.talks[site](envelope)
        return tickets

    def collect(self, tickets: Collection[str]) -> Mapping[str, Envelope | str]:
        return {ticket: self._answers.pop(ticket) for ticket in tickets}

    def reopen(self) -> None:
        raise AssertionError("nothing is down here")


def site(*clients: str, said: Mapping[str, Any] = {}) -> Talk:
    """Return a site that answers each task with a delta of ones, its introduction changed by `said`."""

    def talk(envelope: Envelope) -> Envelope | str:
        if envelope.header["kind"] == "hello":
            told = {c: {"profile": {"num_examples": "4"}, "counts": COUNTS} for c in clients}
            return Envelope({**GREETING, "clients": told, **said})
        pieces = envelope.pieces
        tasks = [
            decode_task(pieces[head] + pieces[body]) for head, body in envelope.header["tasks"]
        ]
        replies = [Reply(task.client, {"delta": {"w": torch.ones(3)}}) for task in tasks]
        messages = [encode_reply(reply, settings=WireSettings()) for reply in replies]
        return Envelope({"answers": [None] * len(messages)}, messages)

    return talk


def remote(**talks: Talk) -> Remote:
    office = Office(dict(talks))
    requests = Requests(office, clock=lambda: 0.0, sleep=lambda _: None)
    return Remote(FedAvg(), WireSettings(), requests, GREETING, deadline=10.0)


def tasks(*clients: str) -> list[Task]:
    return [Task("train", 1, client, i, {}, DOWN) for i, client in enumerate(clients)]


def test_sites_are_met_and_their_clients_are_the_population():
    engine = remote(north=site("b", "c"), south=site("a"))
    engine.meet(["north", "south"], seconds=10)
    assert list(engine.population()) == ["a", "b", "c"]
    assert engine.counts["b"].train == 4
    assert engine.sites["north"].clients == ("b", "c")


def test_replies_come_in_task_order_whoever_hosts_them():
    engine = remote(north=site("b", "c"), south=site("a"))
    engine.meet(["north", "south"], seconds=10)
    deliveries = list(engine.run(tasks("c", "a", "b")))
    assert [d.answer.client for d in deliveries] == ["c", "a", "b"]
    assert all(isinstance(d.answer, Reply) for d in deliveries)
    assert all(d.upload_bytes > 0 and d.download_bytes > 0 for d in deliveries)
    assert engine.sites["south"].upload_bytes == deliveries[1].upload_bytes


def test_a_body_that_tasks_share_travels_once():
    envelopes: list[Envelope] = []

    def spy(envelope: Envelope) -> Envelope | str:
        envelopes.append(envelope)
        return site("a", "b")(envelope)

    engine = remote(north=spy)
    engine.meet(["north"], seconds=10)
    list(engine.run(tasks("a", "b")))
    assert len(envelopes[-1].pieces) == 3


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            {"identity": {**IDENTITY, "fedloom": "0"}},
            r"both sides must have the same version of fedloom \(install the same\):"
            " at the server 1, at the site 0",
        ),
        (
            {"identity": {**IDENTITY, "base": "\x1b[31m"}},
            r"both sides .* weights of the base model .*: at the server b, at the site  \(31m",
        ),
        ({"identity": {}}, "both sides must have the same version of fedloom .*, at the site none"),
        ({"identity": "none"}, "its introduction is malformed"),
        ({"refusal": "this site allows --spaces lora"}, "this site allows --spaces lora"),
        ({"clients": {"b": {"profile": {}, "counts": {}}}}, "its introduction is malformed"),
        (
            {"clients": {"b": {"profile": {}, "counts": {**COUNTS, "rows": "x"}}}},
            "its introduction",
        ),
        ({"clients": ["b"]}, "its introduction is malformed"),
        ({"clients": {}}, "its introduction is malformed"),
        *(
            ({"clients": {"b": {"profile": {}, "counts": {**COUNTS, name: value}}}}, words)
            for name, value, words in (
                ("rows", True, r"the count rows must be in \[0, 2\^53\], got True"),
                ("tokens", -1, "the count tokens"),
                ("target_tokens", 10**400, "the count target_tokens .* got 1000"),
                ("test", 2.0, "the count test"),
                ("labels", {"language": {"de": 4}}, "and no labels"),
                ("labels", 5, "and no labels"),
                ("more", 1, "counts must be train, validation"),
            )
        ),
        *(
            ({"clients": {"b": {"profile": profile, "counts": COUNTS}}}, words)
            for profile, words in (
                ({"a": 1}, "a label must be a printable text"),
                ({"a": "x" * 101}, "a label must be"),
                ({"a": "\x1b[31m"}, "a label must be"),
                ({str(i): "v" for i in range(33)}, "at most 32 labels, got 33"),
                ([], "must be introduced by profile and counts"),
            )
        ),
        *(
            ({"clients": {name: {"profile": {}, "counts": COUNTS}}}, "a client's name must be")
            for name in ("[/x]", "a b", "<script>", "", "x" * 101, "a/../b", "\ud800")
        ),
        (
            {"clients": {f"c{i}": {"profile": {}, "counts": COUNTS} for i in range(10_001)}},
            "must introduce 1 to 10000 clients",
        ),
    ],
)
def test_a_site_that_does_not_fit_is_refused_by_name(said: Mapping[str, Any], words: str):
    engine = remote(north=site("a"), south=site("b", said=said))
    with pytest.raises(ValueError, match=f"south: (its introduction is malformed: .*)?{words}"):
        engine.meet(["north", "south"], seconds=10)


def test_two_sites_cannot_host_one_client():
    engine = remote(north=site("a"), south=site("a"))
    with pytest.raises(ValueError, match="south: client a is at north already"):
        engine.meet(["north", "south"], seconds=10)


def test_a_site_that_does_not_come_is_named():
    engine = remote(north=site("a"))
    ticks = iter(range(100))
    engine.requests.clock = lambda: float(next(ticks))
    with pytest.raises(ValueError, match="south did not join within 5 seconds"):
        engine.meet(["north", "south"], seconds=5)


def test_who_joins_later_takes_part_from_the_next_round():
    engine = remote(north=site("a"))
    engine.meet(["north"], seconds=10)
    office = engine.requests.transport
    assert isinstance(office, Office)
    office.talks["south"] = site("b")
    list(engine.run(tasks("a")))
    assert list(engine.population()) == ["a", "b"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("its worker died", "north: its worker died"),
        (Envelope({"refusal": "too large"}), "north: too large"),
        (Envelope({"refusal": "[/bold]\x1b[31m\n"}), "north: (/bold) (31m "),
        (Envelope({"answers": ["no data", None]}, [b"?"]), "north: no data"),
        (Envelope({"answers": [None]}, []), "north: sent 0 replies to 2 tasks"),
        (Envelope({}, [b"?"]), "north: sent 1 replies to 2 tasks"),
    ],
)
def test_whatever_a_site_sends_back_its_clients_are_at_worst_absent(
    answer: Envelope | str, words: str
):
    def broken(envelope: Envelope) -> Envelope | str:
        return site("a", "b")(envelope) if envelope.header["kind"] == "hello" else answer

    engine = remote(north=broken, south=site("c"))
    engine.meet(["north", "south"], seconds=10)
    first, second, third = [d.answer for d in engine.run(tasks("a", "b", "c"))]
    assert isinstance(first, ClientFailure)
    assert first.reason == words
    assert isinstance(second, ClientFailure)
    assert isinstance(third, Reply)
    assert engine.sites["north"].num_absent >= 1


def test_a_site_that_leaves_at_the_goodbye_is_no_trouble():
    heard: list[str] = []

    def leaving(envelope: Envelope) -> Envelope | str:
        heard.append(envelope.header["kind"])
        return Retryable("its node is gone") if heard[-1] == "bye" else site("a")(envelope)

    engine = remote(north=leaving)
    engine.requests.on_trouble = heard.append
    engine.meet(["north"], seconds=10)
    engine.part()
    assert heard == ["hello", "bye"]


def test_a_site_is_the_client_its_key_was_made_for():
    engine = remote(alba=site("brno"), brno=site("brno"))
    engine.one_client = True
    heard: list[str] = []
    engine.requests.on_trouble = heard.append
    ticks = iter(range(100))
    engine.requests.clock = lambda: float(next(ticks))
    with pytest.raises(ValueError, match=r"^alba: its key is that of alba, but it comes as brno"):
        engine.meet(["alba", "brno"], seconds=20, patient=True)
    assert list(engine.population()) == ["brno"]
    assert len(heard) == 1, "it is told once, and not asked again before it comes anew"
    assert "start `fedloom join` there with --name alba" in heard[0]


def test_one_site_may_not_introduce_others():
    engine = remote(alba=site("alba", "brno", "cork"))
    engine.one_client = True
    with pytest.raises(
        ValueError, match="its key is that of alba, but it comes as alba, brno, cork"
    ):
        engine.meet(["alba"], seconds=10)


def test_a_site_that_was_refused_and_mended_comes_again_while_others_wait():
    engine = remote(north=site("a"), south=site("b", said={"refusal": "its data is bad"}))
    office = engine.requests.transport
    assert isinstance(office, Office)
    heard: list[str] = []
    naps = iter(range(100))

    def nap(_: float) -> None:
        if next(naps) == 3:
            office.talks["south"] = site("b")
            office.connection["south"] = "2"

    engine.requests.on_trouble, engine.requests.sleep = heard.append, nap
    engine.meet(["north", "south"], seconds=10, patient=True)
    assert heard == ["south cannot join: its data is bad; start it again when that is mended"]
    assert list(engine.population()) == ["a", "b"]


def test_every_letter_says_whose_key_it_is_for():
    names: list[Any] = []

    def spy(envelope: Envelope) -> Envelope | str:
        names.append(envelope.header["site"])
        return site("a")(envelope)

    engine = remote(north=spy)
    engine.meet(["north"], seconds=10)
    list(engine.run(tasks("a")))
    assert names == ["north", "north"]


def test_a_round_that_loses_all_its_sites_waits_and_is_sent_again():
    engine = remote(north=site("a"), south=site("b"))
    engine.meet(["north", "south"], seconds=10)
    engine.min_sites = 1
    office = engine.requests.transport
    assert isinstance(office, Office)
    working, naps = dict(office.talks), iter(range(100))
    work = 0

    def dying(envelope: Envelope) -> Envelope | str:
        nonlocal work
        work += 1
        if work == 2:
            office.talks.clear()
        return "its SuperNode is gone"

    office.talks["south"] = office.talks["north"] = dying

    def nap(_: float) -> None:
        if next(naps) == 5:
            office.talks.update(working)

    heard: list[str] = []
    engine.requests.sleep, engine.requests.on_trouble = nap, heard.append
    deliveries = list(engine.run(tasks("a", "b")))
    assert [isinstance(d.answer, Reply) for d in deliveries] == [True, True]
    assert work == 2
    assert heard == ["waiting up to 600 seconds for north, south", "going on"]


def test_an_outage_that_lasts_ends_the_run_with_the_round_unspent():
    engine = remote(north=site("a"))
    engine.meet(["north"], seconds=10)
    engine.min_sites, engine.patience = 1, 30.0
    office = engine.requests.transport
    assert isinstance(office, Office)
    office.talks.clear()
    ticks = iter(range(100))
    engine.requests.clock = lambda: float(next(ticks))
    with pytest.raises(Outage, match="north did not come back within 30 seconds"):
        list(engine.run(tasks("a")))


def test_who_is_there_and_says_no_is_not_waited_for():
    engine = remote(north=site("a", said={}))
    engine.meet(["north"], seconds=10)
    engine.min_sites = 1
    office = engine.requests.transport
    assert isinstance(office, Office)
    office.talks["north"] = lambda _: "its worker died"
    (delivery,) = engine.run(tasks("a"))
    assert isinstance(delivery.answer, ClientFailure)


def test_nobody_is_charged_for_a_letter_that_never_went_out():
    engine = remote(north=site("a"), south=site("b"))
    engine.meet(["north", "south"], seconds=10)
    office = engine.requests.transport
    assert isinstance(office, Office)
    del office.talks["south"]
    here, gone = engine.run(tasks("a", "b"))
    assert here.download_bytes > 0
    assert (gone.download_bytes, gone.upload_bytes) == (0, 0)
    assert engine.sites["south"].download_bytes == 0
