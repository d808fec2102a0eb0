"""Messages that are too many bytes for one: in frames, over a link that is cut, and no copy of them in memory."""

import json
import tracemalloc
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.protocols import ClientFailure, Reply, Task
from fedloom.core.randomness import generator
from fedloom.deploy.greeting import greeting, shared_recipe
from fedloom.deploy.handover import Handover
from fedloom.deploy.limits import Limits
from fedloom.deploy.site import Site
from fedloom.deploy.site_settings import SiteSettings
from fedloom.engines import parcels
from fedloom.engines.parcels import Parcel
from fedloom.engines.remote import Remote, SiteRecord
from fedloom.engines.requests import Envelope, Requests, TransportDown
from fedloom.rounds.loop import advance, begin
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import build
from fedloom.server.samplers import Full
from fedloom.wire.format import decode_task, reply_pieces
from fedloom.wire.wire_settings import WireSettings

Make = Callable[..., Recipe]
Talk = Callable[[dict[str, Any], list[Any]], tuple[dict[str, Any], Any]]


@dataclass
class Wires:
    """A transport to sites in this process that counts what it carries, and is cut where it is told to."""

    talks: dict[str, Talk]
    cut_at: Collection[int] = ()
    """Envelopes after whose answer the link is gone."""
    carried: list[tuple[dict[str, Any], int, int]] = field(default_factory=list)
    """Header, bytes down, bytes up of every envelope."""
    reopened: int = 0
    _answers: dict[str, Envelope | str] = field(default_factory=dict)
    _down: bool = False

    def sites(self) -> Mapping[str, str]:
        return dict.fromkeys(self.talks, f"link {self.reopened}")

    def send(self, envelopes: Mapping[str, Envelope], *, seconds: float) -> Mapping[str, str]:
        tickets = {}
        for site, envelope in envelopes.items():
            header = json.loads(json.dumps(envelope.header))
            said, pieces = self.talks[site](header, list(envelope.pieces))
            answer = Envelope(json.loads(json.dumps(said)), list(pieces))
            sizes = [sum(map(len, one)) for one in (envelope.pieces, pieces)]
            self.carried.append((header, sizes[0], sizes[1]))
            self._down |= len(self.carried) in self.cut_at
            tickets[site] = f"{site} {len(self.carried)}"
            self._answers[tickets[site]] = answer
        return tickets

    def collect(self, tickets: Collection[str]) -> Mapping[str, Envelope | str]:
        if self._down:
            raise TransportDown("the cable was pulled")
        return {ticket: self._answers.pop(ticket) for ticket in tickets}

    def reopen(self) -> None:
        self._down, self.reopened = False, self.reopened + 1


@pytest.fixture
def small_frames(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let a frame be 2 KiB, and return what one message holds."""
    monkeypatch.setattr(parcels, "FRAME", 2048)
    monkeypatch.setattr(parcels, "AT_ONCE", 3)
    return 3 * 2048


def federation(recipe: Recipe, folder: Path, **limits: Any) -> tuple[Remote, Wires, Any]:
    server = build(recipe, folder / "server")
    data = Path(recipe.data.source)

    def site(name: str) -> Talk:
        told = SiteSettings(name, folder / name, data / f"{name}.jsonl", limits=Limits(**limits))
        return Site(told).answer

    wires = Wires({name: site(name) for name in ("alba", "brno", "cork")})
    requests = Requests(wires, sleep=lambda _: None)
    head = greeting(shared_recipe(recipe), server)
    remote = Remote(recipe.algorithm, recipe.wire, requests, head, 60.0, folder=folder / "messages")
    remote.meet(list(wires.talks), seconds=60)
    return remote, wires, server


def rounds(recipe: Recipe, engine: Any, server: Any, number: int) -> Any:
    run = begin(recipe.algorithm, server.space.start(), 0)
    lines = []
    for _ in range(number):
        run, line, failures = advance(
            run, recipe.algorithm, engine, population=engine.population(), sampler=Full()
        )
        assert not failures
        lines.append([line[f"comm/{way}_bytes"] for way in ("download", "upload")])
    return run.state.params, lines


def test_a_link_that_is_cut_costs_what_was_on_its_way_and_changes_nothing(
    recipe: Make, tmp_path: Path, small_frames: int
):
    asked = recipe(tune="full", engine={"flower": {"nodes": 0}})
    remote, wires, server = federation(asked, tmp_path)
    met = len(wires.carried)
    # In the middle of the first upload, and of both ways of round 2; the first download counts from what all have.
    wires.cut_at = [met + 20, met + 85, met + 135]
    params, lines = rounds(asked, remote, server, 2)
    assert wires.reopened == 3
    down = sum(size for _, size, _ in wires.carried[met:])
    up = sum(size for _, _, size in wires.carried[met:])
    whole = [sum(line[at] for line in lines) for at in (0, 1)]
    assert min(whole) > 3 * 10 * small_frames
    # Each of three sites got, or gave, one message's worth of frames again, and its heads with every envelope.
    heads = 600 * len(wires.carried)
    assert whole[0] < down < whole[0] + 3 * 3 * small_frames + heads
    assert whole[1] < up < whole[1] + 3 * 3 * small_frames
    undisturbed, again, _ = federation(asked, tmp_path / "again")
    same, lengths = rounds(asked, undisturbed, server, 2)
    assert lengths == lines
    assert not again.reopened
    assert all(torch.equal(params[name], same[name]) for name in params)
    assert not (tmp_path / "messages").exists()


def test_a_worker_that_is_started_again_asks_for_the_frames_it_lacks(
    recipe: Make, tmp_path: Path, small_frames: int
):
    asked = recipe(tune="full", engine={"flower": {"nodes": 0}})
    remote, wires, server = federation(asked, tmp_path)
    data = Path(asked.data.source) / "alba.jsonl"
    told, before, number = SiteSettings("alba", tmp_path / "alba", data), wires.talks["alba"], 0

    def talk(header: dict[str, Any], pieces: list[Any]) -> tuple[dict[str, Any], Any]:
        nonlocal number
        number += 1
        # A new process, of which nothing but its folder is left.
        if number == 24:
            wires.talks["alba"] = Site(told).answer
        return before(header, pieces)

    wires.talks["alba"] = talk
    met = len(wires.carried)
    rounds(asked, remote, server, 2)
    frames = [
        header["frames"]["at"]
        for header, *_ in wires.carried[met:]
        if header.get("site") == "alba" and "frames" in header
    ]
    # The first download is short: what is tuned counts from what all have.
    assert number == 24
    assert frames == [at * small_frames for at in range(16)]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"parcels": {"0": [10**12, ["0" * 64] * 2]}}, "listing is malformed"),
        ({"parcels": {"0": "huge"}}, "listing is malformed"),
        ({"parcels": {"0": [-5, []]}}, "listing is malformed"),
        ({"parcels": {"3": "more"}}, "listing is malformed"),
        ({"parcels": []}, "list of parcels is malformed"),
        ({"asks": {"of": "parcels", "name": "0", "at": 2048}}, "it asks for what is not handed"),
    ],
)
def test_a_site_that_announces_nonsense_is_absent(said: dict[str, Any], words: str, tmp_path: Path):
    reply = hostile(tmp_path, lambda _: ({"answers": [None], **said}, [b""]))
    assert words in reply.reason


def test_a_site_cannot_fill_the_disk_of_the_server(tmp_path: Path, small_frames: int):
    (tmp_path / "flood").write_bytes(bytes(6_000_000))
    flood = Parcel(tmp_path / "flood")
    said = {"answers": [None], "parcels": {"0": flood.listing.plain()}}

    def talk(header: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        assert header["kind"] == "work", "nothing of it is fetched"
        return said, [b""]

    assert "it announces 6000000 bytes, replies to its tasks have at most" in (
        hostile(tmp_path, talk).reason
    )
    (tmp_path / "odd").write_bytes(bytes(10_000))
    odd = Parcel(tmp_path / "odd")
    said["parcels"] = {"0": odd.listing.plain()}

    def changed(header: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        return (said, [b""]) if header["kind"] == "work" else ({}, [b"\1" * 2048])

    assert "did not arrive as it was sent" in hostile(tmp_path, changed).reason
    assert not (tmp_path / "messages").exists()


def at_one_site(tmp_path: Path, talk: Talk) -> Remote:
    remote = Remote(
        FedAvg(),
        WireSettings(),
        Requests(Wires({"a": talk})),
        {},
        60.0,
        folder=tmp_path / "messages",
        sites={"a": SiteRecord(("a",))},
    )
    remote.host = {"a": "a"}
    return remote


def hostile(tmp_path: Path, talk: Callable[[dict[str, Any]], tuple[dict[str, Any], Any]]) -> Any:
    remote = at_one_site(tmp_path, lambda header, _: talk(header))
    task = Task("train", 1, "a", 0, {}, {"params": {"w": torch.zeros(3)}})
    (delivery,) = remote.run([task])
    assert isinstance(delivery.answer, ClientFailure)
    return delivery.answer


def test_no_copy_of_a_large_message_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parcels, "FRAME", 1 << 18)
    size = 4 << 20
    params = {"w": torch.rand(size // 4, generator=generator(0, "large"))}
    site = Handover(tmp_path / "files", tmp_path / "site")

    def talk(header: dict[str, Any], pieces: list[Any]) -> tuple[dict[str, Any], Any]:
        if header["kind"] == "fetch":
            return {}, site.fetched(header["asks"])
        own = site.take(header, pieces)
        if wanted := site.lacking(header, "parcels"):
            return {"asks": wanted}, []
        own = site.whole(header, own)
        task = decode_task(own[1], body=own[0])
        reply = Reply("a", {"delta": task.download["params"]}, 1.0)
        message = site.spool.joined(reply_pieces(reply, settings=WireSettings()))
        said, left = site.left([message])
        return {"answers": [None], **said}, left

    remote = at_one_site(tmp_path, talk)
    task = Task("train", 1, "a", 0, {}, {"params": params})
    list(remote.run([task]))
    tracemalloc.start()
    (delivery,) = remote.run([task])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(delivery.answer, Reply)
    assert torch.equal(delivery.answer.upload["delta"]["w"], params["w"])
    assert delivery.upload_bytes > size
    # Tensors aside, which both ends have as tensors: of bytes there are some frames at most.
    assert peak < size / 3
