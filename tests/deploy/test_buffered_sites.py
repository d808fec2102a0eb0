"""Buffered rounds over sites: in the order in which answers come, the model of a simulation whose clock has that order."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.deploy.conftest import SITES
from tests.deploy.test_handover import Wires

from fedloom import experiment
from fedloom.core.protocols import ClientId, Profile
from fedloom.data.federation import Federation
from fedloom.deploy.greeting import greeting, shared_recipe
from fedloom.deploy.limits import Limits
from fedloom.deploy.site import Site, all_own
from fedloom.deploy.site_settings import SiteSettings
from fedloom.engines.arrivals import Arrivals
from fedloom.engines.remote import Remote
from fedloom.engines.requests import Envelope, Requests
from fedloom.rounds import buffered as simulated
from fedloom.rounds.buffered import BufferedRun, advance_buffered, buffered
from fedloom.rounds.buffered_sites import advance_arriving
from fedloom.rounds.checkpoint import state_sha256
from fedloom.rounds.clock import Clock, Durations
from fedloom.rounds.loop import Run, begin
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import Makers, Session, build
from fedloom.rounds.training import FinishedRound
from fedloom.server.buffering import Buffered
from fedloom.tracking.records import records
from fedloom.wire.format import decode_task

Make = Callable[..., Recipe]
STEPS = 5
SECONDS = {"alba": 1.0, "brno": 1.7, "cork": 4.1}
MODE = {"buffered": {"size": 2, "max_staleness": 9}}


@dataclass
class Scripted(Wires):
    """Sites whose trainings come back in an order that is given; all else comes at once."""

    hosts: Mapping[str, Site]
    order: list[str] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    bytes: list[bytes] = field(default_factory=list)
    _answers: dict[str, Envelope | str] = field(default_factory=dict)

    def sites(self) -> Mapping[str, str]:
        return {site: "here" for site in self.hosts if site not in self.gone}

    def send(self, envelopes: Mapping[str, Envelope], *, seconds: float) -> Mapping[str, str]:
        sent = super().send(envelopes, seconds=seconds)
        # A ticket says whether its turn has to come.
        return {s: f"{s} waits" if self.order and trains(envelopes[s]) else s for s in sent}

    def collect(self, tickets: Collection[str]) -> Mapping[str, Envelope | str]:
        here = dict[str, Envelope | str]()
        for ticket in tickets:
            site, _, waits = ticket.partition(" ")
            if waits and site in self.gone:
                here[ticket] = "it went"
                continue
            if waits and self.order:
                if self.order[0] != site:
                    continue
                self.order.pop(0)
            here[ticket] = self._answers[site]
        return here


def trains(envelope: Envelope) -> bool:
    if envelope.header["kind"] != "work":
        return False
    ((head, body),) = envelope.header["tasks"]
    return decode_task(envelope.pieces[head], body=envelope.pieces[body]).kind == "train"


def hosted(recipe: Recipe, folder: Path) -> dict[str, Site]:
    """Return the three sites with data of their own."""
    return {
        name: Site(
            SiteSettings(
                name,
                folder / "sites" / name,
                Path(recipe.data.source) / f"{name}.jsonl",
                limits=Limits(min_examples=4),
            )
        )
        for name in SITES
    }


def met(recipe: Recipe, server: Session, wires: Wires) -> Arrivals:
    """Return sites that have joined a server."""
    requests = Requests(wires, on_trouble=lambda _: None, sleep=lambda _: None)
    head = greeting(shared_recipe(recipe), server)
    folder = server.folder / "flower" / "messages"
    remote = Remote(
        recipe.algorithm, recipe.wire, requests, head, 60.0, one_client=True, folder=folder
    )
    remote.meet(SITES, seconds=60)
    return Arrivals(remote)


def in_simulation(
    recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[BufferedRun[Any], list[Any], list[ClientId]]:
    """Return a run by the event clock over the sites' own data, what its steps told, and who answered when."""
    came: list[ClientId] = []
    following = simulated.EventClock.next

    def noted(clock: simulated.EventClock) -> ClientId | None:
        client = following(clock)
        if client is not None:
            came.append(client)
        return client

    source = Path(recipe.data.source)
    own = all_own([SiteSettings(site, folder, source / f"{site}.jsonl") for site in SITES])
    session = build(recipe, folder, makers=Makers(federation=own))
    run = buffered(begin(recipe.algorithm, session.space.start(), recipe.run.seed))
    clock = Durations(Clock(tiers=SECONDS), dict.fromkeys(SITES, 1))
    people: dict[ClientId, Profile] = {c: {**p, "tier": c} for c, p in session.learners.items()}
    told = []
    monkeypatch.setattr(simulated.EventClock, "next", noted)
    for _ in range(STEPS):
        run, line, _ = advance_buffered(
            run, recipe.algorithm, session.engine, durations=clock, **terms(recipe, people)
        )
        told.append(line)
    return run, told, came


def terms(recipe: Recipe, population: Mapping[ClientId, Profile]) -> dict[str, Any]:
    assert isinstance(recipe.run.mode, Buffered)
    return {"mode": recipe.run.mode, "population": population, "sampler": recipe.cohort}


@pytest.mark.parametrize(
    "sections",
    [
        {"algorithm": ["ditto", {"flasc": {"download": 0.5, "upload": 0.25}}, "fedavg"]},
        {"algorithm": {"fedavg": {"weighting": "uniform"}}, "mixes": "models"},
        {
            "algorithm": {"fedkseed": {"steps": 3}},
            "tune": {"seeds": {"num_seeds": 16}},
            "local": {"lr": 0.001, "steps": None},
        },
    ],
    ids=["personal", "models", "seeds"],
)
def test_answers_in_the_order_of_an_event_clock_make_the_model_of_the_simulation(
    sections: dict[str, Any],
    tree: dict[str, Any],
    recipe: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {name: value for name, value in sections.items() if name not in ("mixes", "tune")}
    tree["tune"] = sections.get("tune", tree["tune"])
    mode = {"buffered": {**MODE["buffered"], "mixes": sections.get("mixes", "updates")}}
    made = {**given, "run": {"mode": mode, "rounds": STEPS}}
    expected, lines, came = in_simulation(recipe(**made), tmp_path / "here", monkeypatch)
    asked = recipe(**made, engine={"flower": {"nodes": 0}})
    server = build(asked, tmp_path / "server")
    engine = met(asked, server, Scripted(hosted(asked, tmp_path), came))
    run = buffered(begin(asked.algorithm, server.space.start(), asked.run.seed))
    for line in lines:
        run, told, failures = advance_arriving(
            run, asked.algorithm, engine, **terms(asked, engine.population())
        )
        assert not failures
        for name in ("server/staleness", "comm/num_stale", "comm/num_training", "comm/num_replies"):
            assert told.get(name) == line.get(name)
        assert told["comm/upload_bytes"] > 0 < told["comm/download_bytes"]
        assert "time/virtual_seconds" not in told
    assert max(line["server/max_staleness"] for line in lines) > 0, "somebody is late"
    assert {c: f.began for c, f in run.flights.items()} == {
        c: f.began for c, f in expected.flights.items()
    }
    states = [Run(0, 0, each.state) for each in (run, expected)]
    assert state_sha256(states[0]) == state_sha256(states[1])


class Killed(BaseException):
    """Ends the process as far as the code can tell."""


def test_a_site_that_is_gone_costs_its_place_and_a_server_that_was_ended_asks_anew(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brno goes while it trains, and cork trains still when the server is killed."""
    asked = recipe(
        engine={"flower": {"nodes": 0}},
        run={"mode": {"buffered": {"size": 1}}, "rounds": 4, "samples": 0},
    )
    hosts, wires = hosted(asked, tmp_path), list[Scripted]()
    script = [["alba", "alba", "nobody"], ["cork", "alba"]]

    @contextmanager
    def joined(session: Session, console: Console, *, listening: Any) -> Iterator[Session]:
        wires.append(Scripted(hosts, script[len(wires)]))
        engine = met(session.recipe, session, wires[-1])
        counts, profiles = engine.remote.counts, engine.remote.profiles
        manifest = replace(session.federation.manifest, clients=counts, profiles=profiles)
        yield replace(session, engine=engine, federation=Federation({}, profiles, manifest))
        engine.part()

    monkeypatch.setattr(experiment, "connect", joined)
    folder, failed = tmp_path / "run", list[tuple[str, str]]()

    def watched(finished: FinishedRound) -> None:
        failed.extend((failure.client, failure.reason) for failure in finished.failures)
        wires[0].gone.add("brno")
        if finished.number == 2:
            raise Killed

    with pytest.raises(Killed):
        experiment.run(asked, folder, callbacks=[watched])
    assert failed == [("brno", "it went")]
    left = last_run(build(asked, folder))
    assert isinstance(left, BufferedRun)
    assert {client: flight.began for client, flight in left.flights.items()} == {"cork": 0}
    experiment.run(asked, folder)
    lines = records(folder / "metrics.jsonl").rows()
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4]
    told = ("comm/num_replies", "comm/num_absent", "server/staleness", "comm/num_training")
    assert [[line[name] for name in told] for line in lines[1:]] == [
        [1, 0, 0, 2],
        [1, 1, 0, 1],
        # Asked anew, cork begins at the second step's model.
        [1, 0, 0, 2],
        [1, 0, 1, 2],
    ]
    costs = [line["costs"] for line in records(folder / "costs.jsonl").rows()]
    assert [sorted(line) for line in costs] == [["alba"], ["alba", "brno"], ["cork"], ["alba"]]
    assert costs[0]["alba"]["seconds"] > 0
    # An evaluation waits until everybody has answered, and so does the end.
    assert lines[-1]["test/num_examples"] == lines[0]["test/num_examples"]
    assert not [*(folder / "flower").rglob("*")]
    page = (folder / "report.html").read_text()
    assert "<h2>Staleness</h2>" in page
    assert "irtual time" not in page
