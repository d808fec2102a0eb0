"""What a site has of a model that it may not have: handed over piece by piece, and no more than that."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from tests.deploy.conftest import SITES, seen_of

from fedloom import experiment
from fedloom.data.federation import Federation
from fedloom.deploy.greeting import EMULATOR, greeting, shared_recipe
from fedloom.deploy.handover import Handover, handed_over
from fedloom.deploy.limits import Limits
from fedloom.deploy.preview import site_preview
from fedloom.deploy.site import Site
from fedloom.deploy.site_settings import SiteSettings
from fedloom.engines import parcels
from fedloom.engines.parcels import Listing, Parcel
from fedloom.engines.remote import Remote
from fedloom.engines.requests import Envelope, Requests
from fedloom.engines.transfer import Transfer
from fedloom.models.build import load_base
from fedloom.models.emulator import cut
from fedloom.recipe import build_recipe
from fedloom.recipe_text import to_tree
from fedloom.rounds.emulation import stage_of, unmeasured
from fedloom.rounds.loop import advance, begin
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session, build
from fedloom.server.samplers import Full
from fedloom.spaces.offsite import OffsiteSpace
from fedloom.tracking.records import records

Make = Callable[..., Recipe]
PUBLIC = {"source": "builtin:polyglot", "num_examples": 20}
ALIGN = {"public": PUBLIC, "before": 2, "steps": 1, "batch_size": 2}


class Wires:
    """A transport that hands envelopes to sites in this process, and keeps every byte that they get."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.hosts = sites
        self.bytes: list[bytes] = []
        self._answers: dict[str, Envelope | str] = {}

    def sites(self) -> Mapping[str, str]:
        return dict.fromkeys(self.hosts, "here")

    def send(self, envelopes: Mapping[str, Envelope], *, seconds: float) -> Mapping[str, str]:
        for site, envelope in envelopes.items():
            # As text and bytes, which is all that travels.
            text = json.dumps(envelope.header)
            self.bytes += [text.encode(), *map(bytes, envelope.pieces)]
            self._answers[site] = Envelope(
                *self.hosts[site].answer(json.loads(text), list(envelope.pieces))
            )
        return {site: site for site in envelopes}

    def collect(self, tickets: Collection[str]) -> Mapping[str, Envelope | str]:
        return {ticket: self._answers[ticket] for ticket in tickets}

    def reopen(self) -> None:
        raise AssertionError("it never goes down")


@pytest.fixture
def offsite(recipe: Make, whole: Path) -> Make:
    """Return a maker of the three sites' recipe around an emulator of an eight-layer Llama."""

    def make(factors: int = 0, **more: Any) -> Recipe:
        algorithm: Any = [{"fedbiot": ALIGN}, "fedavg"] if factors else "fedavg"
        adapter = {"lora": {"rank": 2}}
        settings = {"left": 1, "right": 1, "factors": factors, "adapter": adapter, **more}
        model = {"name": str(whole)}
        tree = {**to_tree(recipe()), "algorithm": algorithm, "tune": {"offsite": settings}}
        return build_recipe({**tree, "model": model, "engine": {"flower": {"nodes": 0}}})

    return make


def federation(
    recipe: Recipe, folder: Path, **limits: Any
) -> tuple[Session, Remote, Wires, dict[str, Site]]:
    """Return a server, and the sites that it meets, without a network."""
    server = build(recipe, folder / "server")
    assert isinstance(server.space, OffsiteSpace)
    server.space.save_emulator(folder / "server" / EMULATOR)
    sites = {
        name: Site(
            SiteSettings(
                name,
                folder / "sites" / name,
                Path(recipe.data.source) / f"{name}.jsonl",
                limits=Limits(**limits),
            )
        )
        for name in SITES
    }
    wires = Wires(sites)
    head = greeting(shared_recipe(recipe), server)
    requests = Requests(wires, on_trouble=lambda _: None)
    files = handed_over(folder / "server" / EMULATOR)
    remote = Remote(
        recipe.algorithm, recipe.wire, requests, head, 60.0, one_client=True, files=files
    )
    return server, remote, wires, sites


def assert_nothing_of_the_rest(
    server: Session, wires: Wires, folder: Path, layers: Collection[int]
) -> None:
    """Look at every byte that sites were sent, and at every byte of every file they have."""
    stored = [
        path.read_bytes()
        for name in SITES
        for path in (folder / "sites" / name).rglob("*")
        if path.is_file()
    ]
    assert isinstance(server.space, OffsiteSpace)
    with server.space.whole():
        assert seen_of(server.space.model, stored) == {*layers}
        assert seen_of(server.space.model, wires.bytes) == {*layers}


def test_a_look_finds_two_weights_wherever_they_are(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(layers=3)
    weight = model.model.layers[1].mlp.up_proj.weight.detach().flatten()[101:103]
    for held in (weight, model.model.layers[1].mlp.up_proj.weight.detach().flatten()[7:11].half()):
        assert seen_of(model, [b"odd", b"some " + held.numpy().tobytes() + b" more"]) == {1}
    assert seen_of(model, [b"nothing of it", bytes(64)]) == set()


@pytest.mark.parametrize("int8", [False, True])
def test_sites_learn_around_an_emulator_and_never_get_a_byte_of_the_rest(
    int8: bool, offsite: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parcels, "FRAME", 50_000)
    recipe = offsite(int8=int8)
    server, remote, wires, sites = federation(recipe, tmp_path)
    remote.meet(SITES, seconds=60)
    assert set(remote.population()) == set(SITES)
    run = begin(recipe.algorithm, server.space.start(), 0)
    for _ in range(2):
        run, _, failures = advance(
            run, recipe.algorithm, remote, population=remote.population(), sampler=Full()
        )
        assert not failures
    assert any(t.abs().max() > 0 for t in run.state.params.values())
    # Of what is kept of the middle in eight bits there are whole numbers.
    layers = [0, 7] if int8 else cut(8, left=1, right=1, drop=0.5, rule="floor").layers
    assert_nothing_of_the_rest(server, wires, tmp_path, layers)
    assert all(str(recipe.model.name).encode() not in piece for piece in wires.bytes)
    # Nobody there has a middle to plug anything into.
    session = next(iter(sites["alba"]._ready.values()))[0]
    assert session.evaluator.plugged_in is None


def test_an_aligned_emulator_travels_as_its_factors(offsite: Make, tmp_path: Path) -> None:
    recipe = offsite(factors=2)
    server, remote, wires, _ = federation(recipe, tmp_path)
    remote.meet(SITES, seconds=60)
    stage = stage_of(server)
    assert stage is not None
    run = stage.before(begin(recipe.algorithm, server.space.start(), 0))
    run, _, failures = advance(
        run, recipe.algorithm, remote, population=remote.population(), sampler=Full()
    )
    assert not failures
    run, told = stage.after(run)
    assert told["server/align_kl"] >= 0
    layers = cut(8, left=1, right=1, drop=0.5, rule="floor").layers
    assert_nothing_of_the_rest(server, wires, tmp_path, layers)
    # Which text the server has is not said.
    assert all(b"polyglot" not in piece for piece in wires.bytes)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe, Path], str]:
    """Return what runs a recipe as `fedloom serve` does, with sites in this process; it returns what was printed."""

    @contextmanager
    def joined(session: Session, console: Console, *, listening: Any) -> Iterator[Session]:
        _, remote, _, _ = federation(session.recipe, session.folder.parent)
        remote.meet(SITES, seconds=60)
        manifest = dataclasses.replace(
            session.federation.manifest, clients=remote.counts, profiles=remote.profiles
        )
        held = Federation({}, remote.profiles, manifest)
        yield dataclasses.replace(session, engine=remote, federation=held)

    def serve(recipe: Recipe, folder: Path) -> str:
        monkeypatch.setattr(experiment, "connect", joined)
        out = io.StringIO()
        experiment.run(recipe, folder / "run", console=Console(file=out, width=200))
        return out.getvalue()

    return serve


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_a_server_of_sites_measures_the_whole_model_on_its_own_text(
    offsite: Make, served: Callable[[Recipe, Path], str], tmp_path: Path
) -> None:
    recipe = offsite(factors=2)
    said = served(recipe, tmp_path)
    assert "the whole model is not measured" not in said
    run = tmp_path / "run"
    before, _, last = records(run / "metrics.jsonl").rows()
    # What sites measure has a name of its own, and is of the emulator.
    assert before["test/loss"] > 0 < last["test/loss"]
    assert not any(name.startswith("test/plugin") for name in last)
    assert 0 < last["public/loss"] != last["public/plugin/loss"] != before["public/plugin/loss"]
    stage = stage_of(build(recipe, tmp_path / "other"))
    assert stage is not None
    model = PeftModel.from_pretrained(
        load_base(recipe.model).model, str(run / "adapters" / "global")
    ).eval()
    losses, number = 0.0, 0
    for row in stage.examples:
        with torch.no_grad():
            logits = model(row.ids[None]).logits[0, :-1]
        losses += float(torch.nn.functional.cross_entropy(logits, row.labels[1:], reduction="sum"))
        number += row.num_targets
    assert last["public/plugin/loss"] == pytest.approx(losses / number, rel=1e-5)
    assert last["public/num_tokens"] == number
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final"]["public/plugin/loss"] == last["public/plugin/loss"]
    assert "Public text plug-in loss" in (run / "report.html").read_text()


def test_without_text_of_its_own_a_server_of_sites_says_that_it_cannot(
    offsite: Make, served: Callable[[Recipe, Path], str], tmp_path: Path
) -> None:
    said = " ".join(served(offsite(), tmp_path).split())
    assert (
        "the whole model is not measured: sites have the emulator alone, and there is no text of the server's own, which"
        " algorithm fedbiot names as public"
    ) in said
    assert "public/" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_text_that_the_objective_cannot_read_is_named(offsite: Make, tmp_path: Path) -> None:
    tree = {**to_tree(offsite(factors=2)), "objective": "dpo"}
    session = build(build_recipe(tree), tmp_path)
    said = unmeasured(session, stage_of(session))
    assert said is not None
    assert "fedbiot.public holds nothing that the objective can be judged by" in said


def test_a_file_that_was_cut_off_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parcels, "FRAME", 2)
    monkeypatch.setattr(parcels, "AT_ONCE", 2)
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    (there / "model.safetensors").write_bytes(b"0123456789")
    (there / "config.json").write_bytes(b"{}")

    def header() -> dict[str, Any]:
        listed = {name: parcel.listing.plain() for name, parcel in handed_over(there).items()}
        return {"files": json.loads(json.dumps(listed))}

    asked, files, site = list[Any](), handed_over(there), Handover(here, tmp_path / "messages")
    while (wanted := site.lacking(header(), "files")) is not None:
        asked.append((wanted["name"], wanted["at"]))
        frames = files[wanted["name"]].frames(wanted["at"])
        brought = {**wanted, "number": len(frames)}
        assert site.take({**header(), "frames": brought}, [b"own", *frames]) == [b"own"]
        # Of a site that dies in the middle of a frame, that frame is asked for again.
        for part in here.glob("*.part"):
            part.write_bytes(part.read_bytes() + b"?")
    assert asked == [
        ("config.json", 0),
        ("model.safetensors", 0),
        ("model.safetensors", 4),
        ("model.safetensors", 8),
    ]
    assert {p.name: p.read_bytes() for p in here.iterdir()} == {
        p.name: p.read_bytes() for p in there.iterdir()
    }
    # Another file under the name of one that is here is handed over anew.
    (there / "config.json").write_bytes(b"[]")
    assert site.lacking(header(), "files") == {"of": "files", "name": "config.json", "at": 0}


def test_what_arrives_changed_is_thrown_away_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(b"{}")
    listing, file = Parcel(tmp_path / "sent").listing, tmp_path / "here" / "config.json"
    for frames in ([b"[]"], [b"{{{"], [b"{}", b""]):
        with pytest.raises(ValueError, match=r"config\.json did not arrive as it was sent"):
            parcels.add(file, listing, 0, frames)
    for at in (parcels.FRAME, 0):
        with pytest.raises(ValueError, match="frames that are not the next ones"):
            parcels.add(file, listing, at, [])
    assert not file.parent.exists()


@pytest.mark.parametrize(
    "name", ["../config.json", "model.bin", "x.py", ".hidden.json", "a/b.json"]
)
def test_names_that_lead_elsewhere_and_code_are_not_taken(name: str, tmp_path: Path) -> None:
    header = {"files": {name: Listing(1, ("0" * 64,)).plain()}}
    with pytest.raises(ValueError, match="no file called"):
        Handover(tmp_path, tmp_path).lacking(header, "files")


@pytest.mark.parametrize(
    "asked",
    [
        {"of": "files", "name": "../secret", "at": 0},
        {"of": "files", "name": "a.json", "at": -1},
        {"of": "files", "name": "a.json", "at": 1},
        {"of": "files", "name": "a.json", "at": True},
        {"of": "files", "name": "a.json"},
        {"of": [], "name": {}, "at": 0},
        5,
    ],
)
def test_a_server_hands_over_what_it_lists_and_nothing_else(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    transfer = Transfer(Envelope({}), {"files": handed_over(tmp_path)}, tmp_path)
    answer = transfer.then(Envelope({"asks": asked}))
    assert isinstance(answer, str)
    assert "it asks for" in answer


def test_a_site_whose_limits_refuse_the_recipe_takes_nothing(offsite: Make, tmp_path: Path) -> None:
    _, remote, _, _ = federation(offsite(), tmp_path, spaces=("lora",))
    with pytest.raises(ValueError, match="the recipe tunes offsite"):
        remote.meet(SITES, seconds=60)
    assert not (tmp_path / "sites" / "alba" / EMULATOR).exists()


def test_a_preview_needs_the_emulator_and_says_where_it_comes_from(
    offsite: Make, tmp_path: Path
) -> None:
    recipe = offsite()
    own = Path(recipe.data.source) / "alba.jsonl"
    with pytest.raises(ValueError, match="the server hands it over when this site joins"):
        list(site_preview(SiteSettings("alba", tmp_path / "site", own), shared_recipe(recipe)))


def test_a_whole_model_in_the_emulator_s_place_is_refused(offsite: Make, tmp_path: Path) -> None:
    recipe = offsite()
    own = Path(recipe.data.source) / "alba.jsonl"
    shutil.copytree(str(recipe.model.name), tmp_path / "site" / EMULATOR)
    with pytest.raises(ValueError, match="holds a whole model: remove it"):
        list(site_preview(SiteSettings("alba", tmp_path / "site", own), shared_recipe(recipe)))
