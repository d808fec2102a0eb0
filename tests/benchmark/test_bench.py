"""A plan from nothing to its table: killed, resumed, failing; the same bytes all the same."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import fedloom
from fedloom import cli, experiment
from fedloom.benchmark.plan import read_plan
from fedloom.benchmark.runs import outcomes, run_all
from fedloom.core.files import file_name
from fedloom.models.shared import SharedBases
from fedloom.recipe import build_recipe
from fedloom.recipe_text import to_yaml
from fedloom.results.suite_results import chance, read_results
from fedloom.rounds.recipe_settings import Recipe
from fedloom.spaces.tune import leaves_weights

pytestmark = pytest.mark.slow

SETTINGS = {
    "data.num_examples": 160,
    "data.num_clients": 4,
    "data.max_length": 96,
    "evaluation": {"every": 0, "max_new_tokens": 2},
    "local.steps": 1,
    "local.batch_size": 2,
    "run.rounds": 2,
    "run.samples": 0,
}
QUESTIONS = [
    {"passage": "It is cold.", "question": f"is ice {word}", "answer": word == "cold"}
    for word in ("cold", "hot", "red", "old", "wet")
]
TABLE = ("table.md", "table.tex", "table.csv", "table.json")


@pytest.fixture(scope="module")
def plan_file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a maker of a plan's file; without arguments two methods, one that fails, two seeds."""

    questions = tmp_path_factory.mktemp("suites") / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)))

    def make(**keys: Any) -> Path:
        file = tmp_path_factory.mktemp("plan") / "small.yaml"
        tree = {
            "description": "Two methods",
            "recipe": "quickstart",
            "settings": {**SETTINGS, "model.name": str(tiny_folder)},
            "methods": {
                "FedAvg": None,
                "FedProx | 50 % & more": {"algorithm.fedavg.mu": 0.5},
                "nobody": {"data.where": {"language": ["xx"]}},
            },
            "seeds": [0, 1],
            "baselines": ["local"],
            "suites": {"boolq": {"file": str(questions), "limit": 4}},
        }
        file.write_text(yaml.safe_dump({**tree, **keys}, sort_keys=False))
        return file

    return make


@pytest.fixture(scope="module")
def done(
    plan_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, fedloom.Bench]:
    """Return a plan's file, and what came of it."""
    file = plan_file()
    return file, fedloom.bench(file, tmp_path_factory.mktemp("bench") / "done")


def test_the_table_has_every_row_and_says_what_failed(done: tuple[Path, fedloom.Bench]) -> None:
    _, made = done
    rows = {row.name: row for row in made.table.rows}
    assert [*rows] == ["before training", "FedAvg", "FedProx | 50 % & more", "nobody", "local"]
    assert {name: row.seeds for name, row in rows.items() if name != "before training"} == {
        "FedAvg": 2,
        "FedProx | 50 % & more": 2,
        "nobody": 0,
        "local": 2,
    }
    assert set(rows["nobody"].failed) == {0, 1}
    assert "data.where.language of builtin:polyglot must be among" in rows["nobody"].failed[0]
    (loss,) = (m for m in made.table.metrics if m.name == "test/loss")
    own, other = rows["FedProx | 50 % & more"].values[loss.name], rows["FedAvg"].values[loss.name]
    difference = rows["FedProx | 50 % & more"].beside[loss.name]
    assert difference.mean == pytest.approx(sum(own[s] - other[s] for s in (0, 1)) / 2)
    summaries = [
        json.loads((made.files["table.md"].parent / f"runs/FedAvg/{s}/summary.json").read_text())
        for s in (0, 1)
    ]
    assert other == {s: summaries[s]["final"]["test/loss"] for s in (0, 1)}
    sent = [s["upload_bytes"] + s["download_bytes"] for s in summaries]
    assert rows["FedAvg"].bytes == sum(sent) / 2
    assert rows["local"].bytes is None
    assert rows["FedAvg"].fewer == 1.0


def test_public_tests_are_columns_compared_item_by_item(done: tuple[Path, fedloom.Bench]) -> None:
    _, made = done
    folder = made.files["table.md"].parent
    rows = {row.name: row for row in made.table.rows}
    answers = {
        (row, seed): read_results(folder / "runs" / file_name(row) / str(seed))
        for row in ("FedAvg", "FedProx | 50 % & more", "local")
        for seed in (0, 1)
    }
    assert [len(answers[row, 1]) for row in ("FedAvg", "FedProx | 50 % & more", "local")] == [
        1,
        1,
        0,
    ]
    # The model before training is asked once for the whole table.
    assert [result.model == "base" for result in answers["FedAvg", 0]] == [True, False]
    own, other = answers["FedProx | 50 % & more", 1][0], answers["FedAvg", 1][0]
    assert rows["FedProx | 50 % & more"].values["suite/boolq"][1] == own.score
    assert own.num == 4
    assert rows["FedProx | 50 % & more"].chances["suite/boolq"][1] == chance(
        own.values, other.values
    )
    assert rows["before training"].estimates["suite/boolq"].low is not None
    assert not rows["local"].values["suite/boolq"]
    text = made.files["table.md"].read_text()
    assert "McNemar's exact test on the same items, seed by seed" in text
    assert "local: clients have models of their own, of which none is asked" in text
    assert ", p 1, 1" in text


def test_one_base_is_loaded_for_all_runs_and_none_writes_to_it(
    done: tuple[Path, fedloom.Bench], tmp_path: Path
) -> None:
    """The runs of a table are those of single commands, to the bit; weights that were written to are found."""
    file, made = done
    alone = read_plan(file).recipe_of("FedAvg", 1)
    summary = experiment.run(alone, tmp_path / "alone").summary
    told = json.loads((made.files["table.md"].parent / "runs/FedAvg/1/summary.json").read_text())
    assert told["state_sha256"] == summary["state_sha256"]
    bases = SharedBases()
    again = experiment.run(alone, tmp_path / "shared", bases=bases).summary
    assert again["state_sha256"] == summary["state_sha256"]
    one, other = bases(alone.model), bases(alone.model)
    assert bases.num_loaded == 1
    bases.check()
    places = [{p.data_ptr() for p in base.model.parameters()} for base in (one, other)]
    assert places[0] == places[1]
    next(one.model.parameters()).data.add_(1.0)
    with pytest.raises(ValueError, match="are not as they were before this run"):
        bases.check()
    bases(alone.model)
    assert bases.num_loaded == 2
    kinds = {"lora": True, "full": False, "ia3": True, "offsite": False}
    found = {kind: leaves_weights(build_recipe({**TREE, "tune": kind}).tune) for kind in kinds}
    assert found == kinds
    assert not leaves_weights(build_recipe({**TREE, "tune": {"lora": {"init": "pissa"}}}).tune)


def test_a_run_that_wrote_to_shared_weights_leaves_nothing_that_the_next_call_would_believe(
    plan_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = "[{private: {clip: 1.0, noise_multiplier: 1.0, quiet: true}}, fedavg]"
    methods = {
        "stains": {},
        "fails too": {"local.steps": 3},
        "sound": {"local.steps": 1},
        "quiet": {"algorithm": yaml.safe_load(private), "cohort": {"poisson": {"q": 0.5}}},
    }
    plan = read_plan(plan_file(methods=methods, seeds=[0], baselines=[], suites={}))

    def run(recipe: Recipe, place: Path, *, console: Any, bases: SharedBases) -> None:
        parameter = next(bases(recipe.model).model.parameters())
        if recipe.name in ("stains", "fails too"):
            parameter.data.add_(1.0)
        if recipe.name in ("fails too", "quiet"):
            raise ValueError("client 3 holds the word Aya")
        place.mkdir(parents=True)
        (place / "summary.json").write_text("{}")
        (place / "recipe.yaml").write_text(to_yaml(recipe))

    monkeypatch.setattr(experiment, "run", run)
    run_all(plan, tmp_path, part=0, parts=1, console=Console(quiet=True))
    found = outcomes(plan, tmp_path)
    for name in ("stains", "fails too"):
        assert "are not as they were before this run" in found[name].failed[0]
        assert not (tmp_path / "runs" / file_name(name) / "0" / "summary.json").exists()
    assert [*found["sound"].folders] == [0]
    # A run that is to tell nothing of its clients tells nothing by failing.
    assert found["quiet"].failed[0] == "ValueError"
    assert "Aya" not in (tmp_path / "runs/quiet/0/failed.txt").read_text()


TREE = {"name": "x", "algorithm": "fedavg"}


def test_processes_share_runs_and_what_is_left_of_another_plan_is_refused(
    plan_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(recipe: Recipe, place: Path, **_: Any) -> None:
        # As a run that was asked for what fits.
        sized = dataclasses.replace(recipe, local=dataclasses.replace(recipe.local, batch_size=3))
        place.mkdir(parents=True)
        (place / "summary.json").write_text('{"num_clients": 4}')
        (place / "recipe.yaml").write_text(to_yaml(sized))

    monkeypatch.setattr(experiment, "run", run)
    keys = {"baselines": ["local", "centralised"], "suites": {}}
    settings = {**SETTINGS, "local.batch_size": "auto"}
    plan = read_plan(plan_file(methods={"a": {}, "b": {}}, settings=settings, **keys))
    for part in (1, 0):
        run_all(plan, tmp_path, part=part, parts=2, console=Console(quiet=True))
        found = outcomes(plan, tmp_path)
        assert not any(row.failed for row in found.values())
        assert sum(len(row.folders) for row in found.values()) == 4 * (2 - part)
    shutil.rmtree(tmp_path / "runs/a")
    other = {"a": {"local.steps": 2}, "b": {}}
    plan = read_plan(plan_file(methods=other, settings=settings, **keys))
    assert outcomes(plan, tmp_path)["local"].waiting == [0, 1]
    with pytest.raises(ValueError, match="other settings than the plan has for 'local'"):
        run_all(plan, tmp_path, part=0, parts=1, console=Console(quiet=True))


def test_what_is_not_finite_is_in_the_mean(done: tuple[Path, fedloom.Bench]) -> None:
    file, made = done
    folder = made.files["table.md"].parent
    summary = folder / "runs/FedAvg/1/summary.json"
    before = summary.read_text()
    told = json.loads(before)
    told["final"]["test/loss"] = None
    try:
        summary.write_text(json.dumps(told))
        found = fedloom.bench(file, folder, only_table=True)
        text = found.files["table.md"].read_text()
        assert "| not finite |" in text
        json.loads(found.files["table.json"].read_text(), parse_constant=pytest.fail)
        (loss,) = (m for m in found.table.metrics if m.name == "test/loss")
        assert found.table.best(loss) is None, "one method is left, which nothing is beside"
    finally:
        summary.write_text(before)
        fedloom.bench(file, folder, only_table=True)


def test_each_form_says_the_same(done: tuple[Path, fedloom.Bench]) -> None:
    _, made = done
    texts = {name: file.read_text() for name, file in made.files.items()}
    assert "| FedProx \\| 50 % & more | 2 |" in texts["table.md"]
    assert r"FedProx \textbar{} 50 \% \& more & 2 &" in texts["table.tex"]
    assert r"$\pm$" in texts["table.tex"]
    assert '<td class="">FedProx | 50 % &amp; more</td>' in texts["table.html"]
    assert "<svg" in texts["table.html"]
    rows = list(csv.DictReader(texts["table.csv"].splitlines()))
    told = json.loads(texts["table.json"])
    by_row = {row["row"]: row for row in told["rows"]}
    for line in rows:
        if line["failed"]:
            assert by_row[line["row"]]["failed"][line["seed"]] == line["failed"]
        else:
            assert by_row[line["row"]]["values"][line["metric"]][line["seed"]] == float(
                line["value"]
            )
    for text in (texts["table.md"], texts["table.tex"], texts["table.html"]):
        assert "nobody, seed 1, failed: " in text
    assert "most memory" in texts["costs.md"]


def test_a_plan_that_was_killed_goes_on_to_the_same_bytes(
    done: tuple[Path, fedloom.Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, whole = done
    real, calls = experiment.run, iter(range(100))

    def killed(recipe: Any, folder: Path, **more: Any) -> Any:
        def stop(finished: fedloom.FinishedRound) -> None:
            if finished.number == 1:
                raise KeyboardInterrupt

        # The second run it makes ends in the middle.
        return real(recipe, folder, **more, callbacks=[stop] if next(calls) == 1 else [])

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            fedloom.bench(file, tmp_path / "again")
        # By two processes, of which this is the second, and without one run.
        halves = fedloom.bench(file, tmp_path / "again", part=1, parts=2)
        assert any(row.waiting for row in halves.table.rows)
        assert "was not run yet at seed" in halves.files["table.md"].read_text()
    again = fedloom.bench(file, tmp_path / "again")
    for name in TABLE:
        assert again.files[name].read_bytes() == whole.files[name].read_bytes(), name


def test_what_is_done_is_not_run_again(
    done: tuple[Path, fedloom.Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, made = done
    folder = made.files["table.md"].parent
    made_again = list[str]()

    def count(recipe: Any, *args: Any, **more: Any) -> None:
        made_again.append(recipe.name)
        raise ValueError("not now")

    monkeypatch.setattr(experiment, "run", count)
    fedloom.bench(file, folder, only_table=True)
    assert made_again == []
    fedloom.bench(file, folder)
    # Those that failed are tried again.
    assert made_again == ["nobody", "nobody"]


def test_runs_of_another_plan_are_refused(
    done: tuple[Path, fedloom.Bench], plan_file: Callable[..., Path]
) -> None:
    _, made = done
    other = plan_file(methods={"FedAvg": {"algorithm.fedavg.mu": 0.1}})
    with pytest.raises(
        ValueError, match="was made with other settings than the plan has for 'FedAvg'"
    ):
        fedloom.bench(other, made.files["table.md"].parent)


def test_one_seed_has_wilsons_interval_of_shares(
    done: tuple[Path, fedloom.Bench], plan_file: Callable[..., Path]
) -> None:
    _, made = done
    one = plan_file(seeds=[0], methods={"FedAvg": None})
    found = fedloom.bench(one, made.files["table.md"].parent, only_table=True)
    (row,) = [row for row in found.table.rows if row.name == "FedAvg"]
    share, loss = row.estimates["test/exact_match"], row.estimates["test/loss"]
    assert share.count == 1
    assert share.low is not None
    assert share.low <= share.mean < (share.high or 0)
    assert loss.low is None
    assert "Wilson" in found.files["table.md"].read_text()


def test_a_metric_nobody_measured_is_one_sentence(
    done: tuple[Path, fedloom.Bench], plan_file: Callable[..., Path]
) -> None:
    _, made = done
    asked = plan_file(metrics=["test/glory"])
    with pytest.raises(ValueError, match="metrics must be among what the runs measured"):
        fedloom.bench(asked, made.files["table.md"].parent, only_table=True)


def test_the_command_prints_the_table_and_fails_where_a_run_did(
    done: tuple[Path, fedloom.Bench],
) -> None:
    file, made = done
    folder = made.files["table.md"].parent
    said = CliRunner().invoke(cli.app, ["bench", str(file), "--out", str(folder), "--table"])
    assert said.exit_code == 2
    assert "nobody, seed 0, failed" in " ".join(said.output.split())
    assert "table.tex" in said.output
    wrong = CliRunner().invoke(cli.app, ["bench", str(file), "--part", "2/2"])
    assert "--part must be i/n with i below n" in str(wrong.exception)


def test_a_table_has_no_row_of_a_model_that_was_not_measured(
    plan_file: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    evaluation = {"every": 0, "generate": False, "before": False}
    settings = {**SETTINGS, "model.name": str(tiny_folder), "evaluation": evaluation}
    file = plan_file(methods={"FedAvg": None}, settings=settings, baselines=[], suites={})
    made = fedloom.bench(file, tmp_path / "made")
    assert [row.name for row in made.table.rows] == ["FedAvg"]
    assert "before training" not in made.files["table.md"].read_text()
    # Nobody sees from a loss that two of four replies never came.
    lines = made.files["table.md"].parent / "runs/FedAvg/1/metrics.jsonl"
    rounds = [json.loads(line) for line in lines.read_text().splitlines()]
    rounds[2] |= {"comm/num_replies": 2.0, "comm/num_absent": 2.0}
    lines.write_text("".join(f"{json.dumps(line)}\n" for line in rounds))
    made = fedloom.bench(file, tmp_path / "made")
    text = made.files["table.md"].read_text()
    assert "FedAvg, seed 1: 2 of 8 replies of clients are missing." in text
    assert "FedAvg, seed 0:" not in text
