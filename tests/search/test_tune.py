"""A search from nothing to its best recipe: killed, resumed, failing; the same bytes all the same."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import fedloom
from fedloom import cli
from fedloom.experiment import session
from fedloom.rounds.failure import read_failure
from fedloom.search.trials import go_on

pytest.importorskip("optuna")
pytestmark = pytest.mark.slow

PLANTED = "0.02"
GO_ON = "fedloom.search.tune.go_on"
SPACE = {
    "description": "One of nine rates is good",
    "space": {"local.lr": [1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 0.02, 3.0, 10.0, 30.0]},
    "sampler": "grid",
    "successive_halving": {"eta": 3},
}
RESULT = ("search.md", "search.json", "best.yaml")


@pytest.fixture(scope="module")
def recipe_file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe of nine rounds and three clients."""
    tree = {
        "algorithm": "fedavg",
        "model": {"name": str(tiny_folder)},
        "tune": {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}},
        "data": {
            "num_examples": 60,
            "num_clients": 3,
            "where": {"language": ["en"]},
            "max_length": 192,
        },
        "local": {"steps": 2, "batch_size": 2},
        "evaluation": {"every": 0, "generate": False},
        "run": {"rounds": 9},
    }
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture(scope="module")
def done(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> fedloom.Tuned:
    """Return what came of nine trials, in a folder without another process's marks."""
    return fedloom.tune(recipe_file, SPACE, tmp_path_factory.mktemp("search") / "done")


def test_the_planted_best_of_nine_is_found_with_a_quarter_of_the_grids_rounds(
    done: fedloom.Tuned,
) -> None:
    assert done.outcome.best is not None
    assert done.outcome.best.settings == {"local.lr": PLANTED}
    rounds = [trial.rounds for trial in done.outcome.trials]
    assert sorted(rounds) == [1] * 6 + [3, 3, 9]
    assert sum(rounds) <= 0.4 * 9 * 9
    for trial in done.outcome.trials:
        # A trial is a run like any other, measured on the same rows and sent to the same clients.
        summary = json.loads((trial.folder / "summary.json").read_text())
        assert summary["rounds"] == trial.rounds
        assert trial.bytes == summary["upload_bytes"] + summary["download_bytes"]
        assert trial.value == summary["final"]["validation/loss"]
    manifests = {(t.folder / "manifest.json").read_bytes() for t in done.outcome.trials}
    assert len(manifests) == 1


def test_what_is_written_says_the_same(done: fedloom.Tuned) -> None:
    told = json.loads(done.files["search.json"].read_text())
    assert told["best"] == 5
    assert [trial["rounds"] for trial in told["trials"]] == [t.rounds for t in done.outcome.trials]
    front = [(point["bytes"], point["value"]) for point in told["front"]]
    assert front == sorted(front)
    assert all(after[1] < before[1] for before, after in itertools.pairwise(front))
    assert told["front"][-1]["trial"] == 5
    assert told["agreement"][0]["trials"] == 3
    text = done.files["search.md"].read_text()
    assert "21 rounds and" in text
    assert "Best is trial 5 (local.lr 0.02); test loss" in text
    assert "stopped after round 3" in text
    assert "Spearman's correlation, 3 trials" in text
    page = done.files["search.html"].read_text()
    assert "<svg" in page
    assert "One of nine rates is good" in page


def test_the_best_recipe_runs_to_the_same_bits(done: fedloom.Tuned, tmp_path: Path) -> None:
    assert done.outcome.best is not None
    result = fedloom.run(done.files["best.yaml"], tmp_path / "run", overrides=["run.samples=0"])
    trial = json.loads((done.outcome.best.folder / "summary.json").read_text())
    assert result.summary["state_sha256"] == trial["state_sha256"]
    assert result.summary["name"] == "small-tuned"


def test_a_search_that_was_killed_goes_on_to_the_same_bytes(
    done: fedloom.Tuned, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, lent = itertools.count(), list[Any]()

    def killed(recipe: Any, folder: Path, *, until: int, console: Any, bases: Any) -> None:
        lent.append(bases)
        if next(calls) not in (4, 11):
            go_on(recipe, folder, until=until, console=console, bases=bases)
            return
        with session(recipe, folder, console=console) as going:
            for _ in going.rounds(until):
                raise KeyboardInterrupt  # in the middle of the trial

    monkeypatch.setattr(GO_ON, killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fedloom.tune(recipe_file, SPACE, tmp_path / "again")
    again = fedloom.tune(recipe_file, SPACE, tmp_path / "again")
    # Thirteen pieces of work, of which two were begun twice.
    assert next(calls) == 13 + 2
    # Each search read the model once, however many trials and rungs it made.
    assert {bases.num_loaded for bases in (lent[5], lent[-1])} == {1}
    for name in RESULT:
        assert again.files[name].read_bytes() == done.files[name].read_bytes(), name
    for one, other in zip(again.outcome.trials, done.outcome.trials, strict=True):
        hashes = {
            json.loads((t.folder / "summary.json").read_text())["state_sha256"]
            for t in (one, other)
        }
        assert len(hashes) == 1


def test_the_command_reads_what_is_done_and_refuses_another_search(
    done: fedloom.Tuned, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **more: Any) -> None:
        raise AssertionError("it is done")

    monkeypatch.setattr(GO_ON, never)
    file, folder = tmp_path / "search.yaml", done.files["search.md"].parent
    file.write_text(yaml.safe_dump(SPACE, sort_keys=False))
    asked = ["tune", str(recipe_file), "--space", str(file), "--out", str(folder)]
    for more in ([], ["--table"]):
        said = CliRunner().invoke(cli.app, [*asked, *more])
        assert said.exit_code == 0, said.output
        assert "Best is trial 5" in said.output
        assert "best.yaml" in said.output
    with pytest.raises(
        ValueError, match=r"holds a search with another local\.steps: take another folder"
    ):
        fedloom.tune(recipe_file, file, folder, overrides=["local.steps=3"])
    wrong = CliRunner().invoke(cli.app, [*asked, "--budget", "rounds=many"])
    assert "--budget must be rounds=N or bytes=N" in str(wrong.exception)
    wrong = CliRunner().invoke(cli.app, ["tune", str(recipe_file)])
    assert "--space must name a YAML file" in str(wrong.exception)


def test_a_trial_that_fails_stops_no_other_and_a_search_may_be_made_longer(
    recipe_file: Path, tmp_path: Path
) -> None:
    """Trials drawn by TPE, one by one: the first ones are the same however many are asked for."""
    space = {
        "space": {
            "tune.lora.targets": [["q_proj"], ["no_proj"]],
            "local.lr": {"low": 0.01, "high": 0.02},
        },
        "seed": 1,
    }
    short = ["run.rounds=1"]
    # What an address of a database would take for its own.
    folder = tmp_path / "rank? 50%25"
    one = fedloom.tune(recipe_file, space, folder, trials=1, overrides=short)
    both = fedloom.tune(recipe_file, space, folder, trials=2, overrides=short)
    assert one.outcome.trials[0].settings == both.outcome.trials[0].settings
    failed = {t.settings["tune.lora.targets"]: t.failed for t in both.outcome.trials}
    assert failed["[q_proj]"] == ""
    assert "no_proj" in failed["[no_proj]"]
    (number,) = (t.number for t in both.outcome.trials if t.failed)
    assert read_failure(both.outcome.trials[number].folder) == failed["[no_proj]"]
    assert (folder / "search.db").is_file()
    assert "failed: " in both.files["search.md"].read_text()


def test_a_trial_that_wrote_to_shared_weights_fails_and_leaves_nothing_that_is_believed(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = list[Any]()

    def stains(recipe: Any, folder: Path, *, console: Any, bases: Any) -> Any:
        lent.append(bases)
        if folder.name == "0000":
            next(bases(recipe.model).model.parameters()).data.add_(1.0)
        return session(recipe, folder, console=console, bases=bases)

    monkeypatch.setattr("fedloom.search.trials.session", stains)
    space = {"space": {"local.lr": [0.01, 0.02]}, "sampler": "grid"}
    for _ in range(2):
        made = fedloom.tune(recipe_file, space, tmp_path / "search", overrides=["run.rounds=1"])
        stained, sound = made.outcome.trials
        assert "are not as they were before this run" in stained.failed
        assert [file.name for file in stained.folder.iterdir()] == ["failed.txt"]
        assert not stained.points
        assert sound.value is not None
    assert [bases.num_loaded for bases in lent] == [2, 2], "what comes next reads the model anew"


def test_values_that_do_not_suit_one_another_are_a_failed_trial(
    recipe_file: Path, tmp_path: Path
) -> None:
    space = {"tune": [{"lora": {"rank": 2}}, "ia3"], "tune.lora.alpha": [4.0, 8.0]}
    made = fedloom.tune(
        recipe_file,
        {"space": space, "sampler": "grid"},
        tmp_path / "search",
        overrides=["run.rounds=1"],
    )
    assert [bool(trial.failed) for trial in made.outcome.trials] == [False, False, True, True]
    assert "tune must be one of lora" in made.outcome.trials[2].failed
    assert "****" not in made.files["search.md"].read_text()


def test_a_budget_of_bytes_ends_a_search_and_is_too_small_for_one(
    recipe_file: Path, tmp_path: Path
) -> None:
    space: dict[str, Any] = {
        "space": {"tune.lora.rank": [1, 2, 4]},
        "sampler": "random",
        "trials": 3,
    }
    short = ["run.rounds=2"]
    make: Callable[..., fedloom.Tuned] = lambda most, name: fedloom.tune(  # noqa: E731
        recipe_file,
        {**space, "trials": None},
        tmp_path / name,
        budget={"bytes": most},
        overrides=short,
    )
    with pytest.raises(
        ValueError, match=r"budget\.bytes is enough for 0 rounds, and the least search takes 2"
    ):
        make(1000, "small")
    made = make(60_000, "large")
    spent = sum(trial.bytes for trial in made.outcome.trials)
    assert made.outcome.best is not None
    assert 0 < spent <= 60_000
