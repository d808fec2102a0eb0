"""Secure sums among five sites that join: without a network between them, and once over Flower."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from scipy.stats import chisquare

from fedloom.core.protocols import Task
from fedloom.deploy.greeting import greeting, shared_recipe
from fedloom.deploy.limits import Limits
from fedloom.deploy.site import Site, all_own
from fedloom.deploy.site_settings import SiteSettings
from fedloom.engines import parcels
from fedloom.engines.flower.keys import Keys
from fedloom.engines.remote import Remote
from fedloom.engines.requests import Envelope, Requests
from fedloom.recipe import build_recipe
from fedloom.recipe_text import to_yaml
from fedloom.result import open_run
from fedloom.rounds.loop import advance, begin
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Makers, build
from fedloom.secure.ciphers import Directory
from fedloom.secure.messages import message, read
from fedloom.secure.settings import SecureSettings
from fedloom.wire.body import encode_body
from fedloom.wire.format import task_head

SITES = ("alba", "brno", "cork", "daru", "esch")
SECURE = {"threshold": 3, "bits": 24}
PATIENCE = 400.0
"""Seconds for what takes ten on a machine that has nothing else to do."""
Make = Callable[..., Recipe]
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"algorithm": "fedavg"},
    "flasc": {"algorithm": [{"flasc": {"upload_on": "download"}}, "fedavg"]},
    "fedkseed": {
        "algorithm": {"fedkseed": {"uploads": "delta", "steps": 2}},
        "tune": {"seeds": {"num_seeds": 64}},
        "local": {"optimizer": "sgd", "lr": 1e-3, "batch_size": 2},
    },
}


@dataclass
class Sites:
    """Five sites without a network; some go at a step, and whoever carries their envelopes may change them."""

    settings: Mapping[str, SiteSettings]
    gone: dict[str, str] = field(default_factory=dict)
    """At which step a site stops answering."""
    meddle: Callable[[str, dict[str, Any], list[Any]], None] = lambda site, header, pieces: None
    received: list[tuple[str, str, bytes]] = field(default_factory=list)
    said: dict[str, list[str]] = field(default_factory=dict)
    _answers: dict[str, Envelope | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hosts = {
            name: Site(settings, self.said.setdefault(name, []).append)
            for name, settings in self.settings.items()
        }

    def sites(self) -> Mapping[str, str]:
        return dict.fromkeys(self.hosts, "here")

    def send(self, envelopes: Mapping[str, Envelope], *, seconds: float) -> Mapping[str, str]:
        for site, envelope in envelopes.items():
            header, pieces = json.loads(json.dumps(envelope.header)), list(envelope.pieces)
            step = str(header.get("step", header["kind"]))
            if self.gone.get(site) == step:
                self.gone[site] = "all"
            if self.gone.get(site) == "all":
                self._answers[site] = "gone"
                continue
            self.meddle(site, header, pieces)
            told, answered = self.hosts[site].answer(header, pieces)
            parts = [bytes(part) for part in answered]
            self.received += [(step, site, part) for part in parts]
            self._answers[site] = Envelope(json.loads(json.dumps(told)), [*parts])
        return {site: site for site in envelopes}

    def collect(self, tickets: Collection[str]) -> Mapping[str, Envelope | str]:
        return {ticket: self._answers[ticket] for ticket in tickets}

    def reopen(self) -> None:
        raise AssertionError("it never goes down")


@pytest.fixture(scope="module")
def home(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with every site's data and keys."""
    folder = tmp_path_factory.mktemp("secure")
    (folder / "data").mkdir()
    keys = Keys(folder / "keys")
    keys.init(())
    for at, site in enumerate(SITES):
        rows = [{"prompt": f"say {i}", "completion": f"{i * (at + 2)}"} for i in range(20 + 4 * at)]
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / "data" / f"{site}.jsonl").write_text(text)
        keys.add(site)
    return folder


@pytest.fixture(scope="module")
def recipe(home: Path, tiny_folder: Path) -> Make:
    """Return a maker of the five sites' recipe."""

    def make(**sections: Any) -> Recipe:
        local = {"optimizer": "sgd", "lr": 0.1, "steps": 1, "batch_size": 2, "kernels": "torch"}
        tree = {
            "name": "five",
            "algorithm": "fedavg",
            "model": {"name": str(tiny_folder)},
            "tune": {"lora": {"rank": 2, "targets": ["q_proj"]}},
            "data": {"source": str(home / "data"), "max_length": 64}
            | {"partition": {"natural": {"by": "file"}}},
            "local": {**local, "batched": "off"},
            "evaluation": {"every": 0, "generate": False, "validation": False},
            "run": {"rounds": 1, "samples": 0},
            "engine": {"flower": {"nodes": 0}},
            "secure": SECURE,
        }
        return build_recipe({**tree, **sections})

    return make


Met = tuple[Recipe, Remote, Sites, Any]


def settings_of(home: Path, folder: Path, **limits: Any) -> dict[str, SiteSettings]:
    return {
        name: SiteSettings(
            name,
            folder / "sites" / name,
            home / "data" / f"{name}.jsonl",
            limits=Limits(min_examples=4, **limits),
            keys=home / "keys" / "sites" / name,
        )
        for name in SITES
    }


def federation(
    recipe: Recipe, home: Path, folder: Path, **limits: Any
) -> tuple[Remote, Sites, Any]:
    server, sites = build(recipe, folder / "server"), Sites(settings_of(home, folder, **limits))
    head = greeting(shared_recipe(recipe), server)
    requests = Requests(sites, sleep=lambda _: None)
    public = {name: path.read_bytes() for name, path in Keys(home / "keys").sites().items()}
    remote = Remote(
        recipe.algorithm,
        recipe.wire,
        requests,
        head,
        60.0,
        one_client=True,
        secure=recipe.secure,
        directory=Directory(public),
        folder=folder / "messages",
    )
    remote.meet(SITES, seconds=60)
    return remote, sites, server


def in_the_open(recipe: Recipe, home: Path, folder: Path, *, without: Collection[str] = ()) -> Any:
    """Return the params after a round over the same sites' uploads, added up as they are."""
    plain = replace(recipe, secure=None)
    everybody = settings_of(home, folder).values()
    session = build(plain, folder, makers=Makers(federation=all_own(everybody)))
    run = begin(plain.algorithm, session.space.start(), plain.run.seed)
    there = {c: p for c, p in session.learners.items() if c not in without}
    # Who takes part says nothing of the seeds of the others.
    run, _, _ = advance(
        run, plain.algorithm, session.engine, population=there, sampler=plain.cohort
    )
    return run.state.params


def one_round(recipe: Recipe, remote: Remote, server: Any) -> tuple[Any, Any, Any]:
    run = begin(recipe.algorithm, server.space.start(), recipe.run.seed)
    return advance(
        run, recipe.algorithm, remote, population=remote.population(), sampler=recipe.cohort
    )


def apart(one: Any, other: Any) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize(
    "name", ["fedavg", "flasc", pytest.param("fedkseed", marks=pytest.mark.slow)]
)
def test_five_sites_have_the_model_of_uploads_in_the_open(
    name: str, recipe: Make, home: Path, tmp_path: Path
):
    """One site is gone before its upload and one after it; nothing that the server received is an upload."""
    asked = recipe(**METHODS[name])
    remote, sites, server = federation(asked, home, tmp_path)
    sites.gone = {"brno": "work", "daru": "consent"}
    run, line, failures = one_round(asked, remote, server)
    assert [(failure.client, failure.reason) for failure in failures] == [("brno", "gone")]
    assert (line["comm/num_replies"], line["comm/round_kept"]) == (4, 1)
    plain = in_the_open(asked, home, tmp_path / "open", without={"brno"})
    assert apart(run.state.params, plain) <= 4 * 2.0**-24 + 1e-7
    assert apart(run.state.params, server.space.start()) > 1e-5
    uploads = [read(data)[1][0] for step, _, data in sites.received if step == "work"]
    assert len(uploads) == 4
    counts = np.bincount(np.frombuffer(b"".join(uploads), np.uint8), minlength=256)
    assert chisquare(counts).pvalue > 1e-6


def test_sites_add_shares_of_noise_to_as_many_sums_as_are_accounted_for(
    recipe: Make, home: Path, tmp_path: Path
):
    private = {"clip": 0.05, "noise_multiplier": 1.0, "delta": 0.1, "noise": "distributed"}
    asked = recipe(
        algorithm=[{"private": private}, "fedavg"],
        cohort={"poisson": {"q": 1.0}},
        tune={"lora": {"rank": 2, "targets": ["q_proj"], "origin": "initial"}},
    )
    remote, _, server = federation(asked, home, tmp_path)
    run, line, failures = one_round(asked, remote, server)
    assert not failures
    noise = torch.cat([t.double().flatten() for t in run.state.inner.params.values()])
    # Of five, where three would do: z C sqrt(5 / 3) / 5, and what was learnt of norm 0.05 in it.
    assert float(noise.std()) == pytest.approx(0.05 * (5 / 3) ** 0.5 / 5, rel=0.25)
    assert line["server/epsilon"] > 0
    # A server that goes back and asks for the round again gets no second sum: the recipe has one round.
    _, line, failures = one_round(asked, remote, server)
    assert line["comm/round_kept"] == 0
    assert "this site has added its noise to 1 sums" in " ".join(f.reason for f in failures)
    counts = [*tmp_path.glob("sites/*/noisy_sums/*/*")]
    assert [file.read_text() for file in counts] == ["1\n"] * 5


@pytest.fixture(scope="module")
def met(recipe: Make, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Met:
    """Return the recipe of five who must all be there, its server, and the sites that it has met."""
    asked = recipe(secure={"threshold": 5})
    return asked, *federation(asked, home, tmp_path_factory.mktemp("met"))


@pytest.fixture
def five(met: Met) -> Met:
    """Return them, honest and all there."""
    _, _, sites, _ = met
    sites.gone, sites.meddle = {}, lambda site, header, pieces: None
    sites.received.clear()
    return met


def test_below_the_threshold_a_round_is_refused_and_the_next_is_not(five: Met):
    asked, remote, sites, server = five
    sites.gone = {"cork": "share"}
    run, line, failures = one_round(asked, remote, server)
    assert line["comm/round_kept"] == 0
    assert apart(run.state.params, server.space.start()) == 0
    assert len(failures) == 5
    assert any("needs 5 clients (secure.threshold" in failure.reason for failure in failures)
    # Nobody trained for it.
    assert not [step for step, *_ in sites.received if step == "work"]
    sites.gone = {}
    _, line, failures = one_round(asked, remote, server)
    assert (line["comm/num_replies"], failures) == (5, [])


def test_a_server_that_asks_for_both_kinds_of_share_is_refused_and_named_at_the_site(five: Met):
    asked, remote, sites, server = five

    def greedy(site: str, header: dict[str, Any], pieces: list[bytes]) -> None:
        if header.get("step") == "reveal":
            told, parts = read(pieces[0])
            pieces[0] = message({**told, "dead": [*told["dead"], "brno"]}, parts)

    sites.meddle = greedy
    _, line, _ = one_round(asked, remote, server)
    assert line["comm/round_kept"] == 0
    assert not [step for step, *_ in sites.received if step == "reveal"]
    for said in sites.said.values():
        assert "refused: the server asks for both kinds of share of brno" in said[-1]


def test_a_site_sends_no_upload_without_a_mask_and_none_of_another_task(five: Met):
    asked, remote, sites, server = five
    run = begin(asked.algorithm, server.space.start(), 0)
    body = encode_body({"params": run.state.params})
    task = Task("train", 1, "alba", 7, {}, {})
    head = {**remote.greeting, "kind": "work", "site": "alba", "tasks": [[0, 1]]}
    said, pieces = sites.hosts["alba"].answer(dict(head), [task_head(task, body), body])
    assert "but the server asks for one by itself: nothing is sent" in said["refusal"]
    assert not pieces

    def another(site: str, header: dict[str, Any], pieces: list[bytes]) -> None:
        if "sum" in header and site == "esch":
            (at,) = [own for _, own in header["tasks"]]
            other = encode_body({"params": {n: t + 1 for n, t in run.state.params.items()}})
            head, _ = header["tasks"][0]
            pieces[at], pieces[head] = other, task_head(replace(task, client="esch"), other)

    sites.meddle = another
    _, line, failures = one_round(asked, remote, server)
    (why,) = [failure.reason for failure in failures if failure.client == "esch"]
    assert "not the one that the keys of this sum are bound to" in why
    assert line["comm/round_kept"] == 0


def test_a_site_has_conditions_of_its_own(five: Met, home: Path, tmp_path: Path):
    asked, remote, sites, server = five
    limits = Limits(min_cohort=4)
    with pytest.raises(
        ValueError, match=r"at least --min-cohort 4, the recipe has secure.threshold 3"
    ):
        limits.check_recipe(replace(asked, secure=SecureSettings(3)))
    with pytest.raises(ValueError, match="--min-cohort 4, the recipe has no section secure"):
        limits.check_recipe(replace(asked, secure=None))
    limits.check_recipe(asked)
    with pytest.raises(ValueError, match="--min-cohort must be 0 or at least 2, got 1"):
        Limits(min_cohort=1)
    peers = home / "keys" / "sites" / "alba" / "peers"
    assert sorted(path.stem for path in peers.iterdir()) == list(SITES)
    # Its folder was copied before the others had keys.
    alone = tmp_path / "alone"
    shutil.copytree(home / "keys" / "sites" / "alba", alone)
    for peer in ("brno", "alba"):
        (alone / "peers" / f"{peer}.pub").unlink()
    site = sites.hosts["alba"]
    site.settings = replace(site.settings, keys=alone)
    _, line, failures = one_round(asked, remote, server)
    (why,) = [failure.reason for failure in failures if failure.client == "alba"]
    assert "copy the site's folder from the server's keys again" in why
    assert line["comm/num_replies"] == 0
    shutil.copy(peers / "alba.pub", alone / "peers")
    _, line, failures = one_round(asked, remote, server)
    (why,) = [failure.reason for failure in failures if failure.client == "alba"]
    assert "brno would take part in the sum, whose key this site was not given" in why
    # What is copied while it runs is read. No site's own clip is lost under a mask.
    shutil.copy(peers / "brno.pub", alone / "peers")
    for host in sites.hosts.values():
        host.settings = replace(host.settings, limits=Limits(min_examples=4, clip=2e-6))
    run, line, failures = one_round(asked, remote, server)
    for name, host in sites.hosts.items():
        host.settings = sites.settings[name]
    assert (line["comm/num_replies"], failures) == (5, [])
    assert 0 < apart(run.state.params, server.space.start()) <= 4e-6


def test_envelopes_without_a_message_of_a_sum_are_refused_in_one_sentence(five: Met):
    asked, remote, sites, server = five
    site, head = sites.hosts["alba"], {**remote.greeting, "site": "alba"}
    body = encode_body({"params": server.space.start()})
    work = [task_head(Task("train", 1, "alba", 7, {}, {}), body), body]
    empty = {**head, "kind": "sum", "step": "share"}
    for header, pieces in (
        (empty, []),
        ({**head, "kind": "work", "tasks": [[0, 1]], "sum": 7}, work),
        ({**head, "kind": "work", "tasks": [[0, 1]], "sum": "x"}, work),
    ):
        told, sent = site.answer(header, pieces)
        assert (told, sent) == (
            {"refusal": "the envelope is malformed: no message of a secure sum is in it"},
            [],
        )
    told, _ = site.answer({**empty, "step": "upload"}, [b""])
    assert told == {"refusal": "a secure sum has no step 'upload'"}
    before = bytes_of(remote)
    _, line, failures = one_round(asked, remote, server)
    assert (line["comm/num_replies"], failures) == (5, [])
    # All five exchanges are in the sites' own counts.
    down, up = (now - was for now, was in zip(bytes_of(remote), before, strict=True))
    assert (down, up) == (line["comm/download_bytes"], line["comm/upload_bytes"])


def test_uploads_of_a_sum_that_are_too_large_for_one_message_come_in_frames(
    five: Met, monkeypatch: pytest.MonkeyPatch
):
    asked, remote, sites, server = five
    monkeypatch.setattr(parcels, "FRAME", 256)
    before = bytes_of(remote)
    _, line, failures = one_round(asked, remote, server)
    assert (line["comm/num_replies"], failures) == (5, [])
    assert {site for step, site, _ in sites.received if step == "fetch"} == {*SITES}
    down, up = (now - was for now, was in zip(bytes_of(remote), before, strict=True))
    assert (down, up) == (line["comm/download_bytes"], line["comm/upload_bytes"])


def bytes_of(remote: Remote) -> tuple[int, int]:
    """Return what went to all sites so far, and what came of them."""
    records = remote.sites.values()
    return sum(r.download_bytes for r in records), sum(r.upload_bytes for r in records)


@pytest.mark.slow
@pytest.mark.flower
@pytest.mark.timeout(900)
def test_five_sites_over_flower_lose_one_before_its_upload_and_one_after(
    recipe: Make, home: Path, tmp_path: Path, nothing_left: None
):
    pytest.importorskip("flwr", reason="the extra `flower` is not installed")
    from fedloom.engines.flower.processes import free_port

    asked, out, port = recipe(), tmp_path / "run", free_port()
    file, address = tmp_path / "recipe.yaml", f"127.0.0.1:{port}"
    file.write_text(to_yaml(asked))
    serve = ["serve", str(file), "--listen", address, "--keys", str(home / "keys")]
    words = {"server": [*serve, "--out", str(out)]}
    for site in SITES:
        keys, data = home / "keys" / "sites" / site, home / "data" / f"{site}.jsonl"
        told = ["--keys", str(keys), "--data", str(data), "--folder", str(tmp_path / site)]
        words[site] = ["join", address, "--name", site, *told, "--min-examples", "4"]
    programs = {name: started(tmp_path / f"{name}.log", said) for name, said in words.items()}
    try:
        brno, daru = (
            lambda site=site: (tmp_path / f"{site}.log").read_text() for site in ("brno", "daru")
        )
        until(lambda: "agreed on masks with alba, cork, daru, esch" in brno(), programs["server"])
        kill_worker(programs["brno"].pid)
        until(lambda: "done and masked" in daru(), programs["server"])
        kill_worker(programs["daru"].pid)
        assert programs["server"].wait(PATIENCE) == 0, (tmp_path / "server.log").read_text()
    finally:
        for program in programs.values():
            program.terminate()
            program.wait(60)
    log = (tmp_path / "server.log").read_text()
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    counted = [line[f"comm/{name}"] for name in ("num_replies", "num_absent", "round_kept")]
    assert counted == [4, 1, 1], log
    assert "brno is absent" in log
    params = open_run(out).open("export").run.state.params
    plain = in_the_open(asked, home, tmp_path / "open", without={"brno"})
    assert apart(params, plain) <= 4 * 2.0**-24 + 1e-7


def started(log: Path, words: list[str]) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "COLUMNS": "300", "PYTHONUNBUFFERED": "1"}
    with open(log, "wb") as said:
        command = [sys.executable, "-m", "fedloom.cli", *words]
        return subprocess.Popen(command, stdout=said, stderr=said, env=environment)


def until(true: Callable[[], bool], server: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "took too long"
        assert server.poll() is None, "ended early"
        time.sleep(0.05)


def kill_worker(pid: int) -> None:
    for child in psutil.Process(pid).children(recursive=True):
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:  # It has ended meanwhile.
            continue
        if "guard.py" not in command and "fedloom.deploy.worker" in command:
            child.send_signal(signal.SIGKILL)
