"""What a run keeps for an audit, what an attack is given of it, and the command."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fedloom import cli, experiment
from fedloom.audit.findings import Finding
from fedloom.audit.records import Case, open_case, seen
from fedloom.baselines import baseline_of
from fedloom.core.description import describe
from fedloom.core.params import norm
from fedloom.recipe import load_recipe
from fedloom.recipe_text import to_yaml
from fedloom.report.page import report_html
from fedloom.rounds.received import NOTE, read_round, recorded_rounds
from fedloom.rounds.recipe_settings import Recipe


@dataclass(frozen=True)
class Length:
    """Finds out how far each upload moved."""

    title: str = "how far uploads go"
    assumes: str = "whoever reads uploads"
    of_uploads: bool = True

    def silent(self, case: Case) -> str | None:
        return None if case.recipe.tune.is_adapter else "it measures adapters alone"

    def findings(self, case: Case) -> Iterator[Finding]:
        for one in case.uploads():
            far = norm({"delta": case.delta(one)})
            names = ", ".join(one.clients)
            says = f"the upload of {names} went {far:.3g} far"
            yield Finding(
                "length", case.space, case.link, seen(one), "norm", far, 0.0, says, names, one.round
            )


@dataclass(frozen=True)
class Elsewhere(Length):
    """Looks at something else."""

    of_uploads: bool = False

    def findings(self, case: Case) -> Iterator[Finding]:
        raise AssertionError("it is not made where uploads are chosen")


@pytest.fixture(scope="module")
def recipe(small_recipe: Callable[..., Recipe]) -> Recipe:
    return small_recipe(
        audit="record",
        cohort={"uniform": {"size": 3}},
        wire={"upload": "int8"},
        evaluation={"generate": False, "every": 0, "max_examples": 2},
        run={"rounds": 3, "samples": 0},
    )


@pytest.fixture(scope="module")
def folder(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of three rounds that was ended after the second and gone on with."""
    home = tmp_path_factory.mktemp("audit") / "run"
    with experiment.session(recipe, home) as going:
        for _ in going.rounds(until=2):
            pass
    experiment.run(recipe, home)
    return home


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fedloom.audit.conduct.ATTACKS", {"length": Length(), "elsewhere": Elsewhere()}
    )


def run(*words: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["fedloom", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_a_run_keeps_every_upload_as_the_server_read_it_and_what_it_answers(folder: Path):
    assert recorded_rounds(folder) == [1, 2, 3]
    case = open_case(folder, console=Console(quiet=True), round=2)
    received = list(case.uploads())
    assert len(received) == 3
    assert {name for one in received for name in one.clients} <= set(case.session.learners)
    # The mean of what was kept is the step from what was sent to what was sent next.
    total = sum(one.weight for one in received)
    (release,) = case.releases()
    for name, moved in release.upload["delta"].items():
        parts = [one.weight / total * case.delta(one)[name].double() for one in received]
        assert torch.allclose(moved.double(), torch.stack(parts).sum(0), atol=1e-6)
    assert release.clients == [name for one in received for name in one.clients]
    assert all(
        one.num_bytes < 4 * sum(t.numel() for t in case.delta(one).values()) for one in received
    )


def test_a_round_that_is_made_again_is_kept_once(folder: Path):
    assert all(len(list(read_round(folder, number))) == 3 for number in (1, 2, 3))


def test_a_report_says_that_uploads_are_kept_and_a_baseline_keeps_none(
    folder: Path, recipe: Recipe
):
    assert NOTE.partition(":")[0] in report_html(folder)
    assert baseline_of(recipe, "centralised", summary={"num_clients": 4}).audit == "off"


@pytest.mark.usefixtures("toy")
def test_the_command_writes_a_table_a_picture_and_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    client = next(read_round(folder, 3)).clients[0]
    assert run("audit", folder, "--client", client, "--round", 3, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "what each number says" in said
    assert "elsewhere says nothing: it looks at no uploads, which --round and --client" in said
    table = (folder / "audit/audit.md").read_text()
    assert f"| length | {client} | 3 | upload | norm |" in table
    assert "- length assumes: whoever reads uploads." in table
    content = json.loads((folder / "audit/audit.json").read_text())
    (finding,) = content["findings"]
    assert finding["value"] == pytest.approx(norm(next(read_round(folder, 3)).upload))
    assert (finding["space"], finding["link"]) == ("lora, rank 2", "fedavg, int8")
    assert (folder / "audit/audit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--client", "nobody"], "--client must be one of the run's"),
        (["--round", "9"], "--round must be one that was recorded, 1, 2, 3, got 9"),
        (["--attack", "guess"], "--attack must be one of length, elsewhere, got 'guess'"),
        (["--attack", "elsewhere", "--round", "1"], "--attack elsewhere: it looks at no uploads"),
    ],
)
def test_what_is_not_there_is_refused_in_one_sentence(
    folder: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    assert run("audit", folder, *words, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_uploads_of_a_round_that_did_not_end_are_not_looked_at(recipe: Recipe, tmp_path: Path):
    home = tmp_path / "run"
    with experiment.session(recipe, home) as going:
        for _ in going.rounds(until=1):
            pass
    shutil.copytree(home / "received/round-00001", home / "received/round-00002")
    assert open_case(home, console=Console(quiet=True)).rounds == [1]
    with pytest.raises(ValueError, match="must be one that was recorded, 1, got 2"):
        open_case(home, console=Console(quiet=True), round=2)


def test_sums_are_of_the_clients_of_one_group(small_recipe: Callable[..., Recipe], tmp_path: Path):
    """In the first round all are sent one model, and still two clusters are two sums."""
    pytest.importorskip("cryptography")
    mode = {"random": {"num_clusters": 2}}
    recipe = small_recipe(
        audit="record",
        algorithm=[{"clustered": {"mode": mode, "share": {"pool": "off"}}}, "fedavg"],
        secure={"threshold": 2},
        evaluation={"generate": False, "every": 0, "max_examples": 1},
        run={"rounds": 2, "samples": 0},
    )
    folder = experiment.run(recipe, tmp_path / "run").folder
    case = open_case(folder, console=Console(quiet=True))
    clusters = describe(recipe.algorithm, case.run.state).clusters
    assert clusters is not None
    named = clusters.assignment
    together = {
        frozenset(client for client in named if named[client] == name) for name in named.values()
    }
    assert len(together) == 2
    for number in (1, 2):
        assert {frozenset(one.clients) for one in case.uploads([number])} == together
    assert not list(case.releases()), "of which no one model comes"


def test_answers_of_rounds_that_wait_for_nobody_lie_where_they_began(
    small_recipe: Callable[..., Recipe], tmp_path: Path
):
    recipe = small_recipe(
        audit="record",
        cohort={"uniform": {"size": 3}},
        evaluation={"generate": False, "every": 0, "max_examples": 1},
        run={"rounds": 1, "samples": 0, "mode": {"buffered": {"size": 1}}},
    )
    folder = experiment.run(recipe, tmp_path / "run").folder
    case = open_case(folder, console=Console(quiet=True))
    assert len(list(case.uploads())) == 3, "one of them is in the first step, two wait for theirs"
    assert not list(case.releases()), (
        "the step is of one of these three, and no record says of which"
    )


def test_a_run_without_records_is_refused(tmp_path: Path, recipe: Recipe):
    (tmp_path / "run").mkdir()
    text = to_yaml(load_recipe("quickstart"))
    (tmp_path / "run/recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match="kept none of what its server received"):
        open_case(tmp_path / "run", console=Console(quiet=True))


def test_uploads_of_sites_and_of_quiet_runs_are_not_kept():
    with pytest.raises(ValueError, match="audit: record keeps clients' uploads, which sites send"):
        load_recipe(
            "quickstart", ["engine={flower: {nodes: 0}}", "audit=record", "run.baselines=[]"]
        )
    with pytest.raises(ValueError, match=r"private\.quiet keeps what is told"):
        load_recipe("private", ["audit=record", "algorithm.private.quiet=true", "run.samples=0"])
    with pytest.raises(ValueError, match="audit"):
        load_recipe("quickstart", ["audit=everything"])
    assert load_recipe("private", ["audit=record"]).audit == "record"
