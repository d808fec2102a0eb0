"""The table of runs that are there, as numbers; the folders are written by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedloom.benchmark.plan import BenchPlan
from fedloom.benchmark.runs import Outcomes
from fedloom.benchmark.suites import is_asked, results_of
from fedloom.benchmark.table import BenchTable, Row, table_of
from fedloom.benchmark.written import write_all
from fedloom.results.statistics import wilson
from fedloom.results.suite_results import SuiteResult, keep
from fedloom.results.suites import BASE, shown_sha256

_MINE = {"mine": {"title": "my own", "unit": "%", "better": "higher"}}
_ENDS = ({"test/accuracy": 0.1, "validation/accuracy": 0.2}, {"test/accuracy": 0.4})
_MACHINE = {"cpu": "a", "os": "b", "num_threads": 1}


def _run(
    folder: Path,
    final: Mapping[str, float],
    *,
    before: Mapping[str, float] = _ENDS[0],
    metrics: Any = (),
    quiet: bool = False,
) -> Path:
    folder.mkdir(parents=True)
    rows = {} if quiet else {"test": 10.0, "validation": 40.0}
    counts = {f"{split}/num_examples": count for split, count in rows.items()}
    ends = enumerate(({}, {}) if quiet else (before, final))
    _write(folder / "metrics.jsonl", [{"round": at, **end, **counts} for at, end in ends])
    told = [
        {"round": at, "client": "c", "split": split, "metrics": {"num_examples": count}}
        for at in (0, 1)
        for split, count in rows.items()
    ]
    _write(folder / "clients.jsonl", told)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"evaluation": {"metrics": list(metrics)}}))
    sent = {"upload_bytes": 3, "download_bytes": 5, "train_seconds": 1.0, "evaluation_seconds": 2.0}
    summary = {
        "before": {} if quiet else {**before},
        "final": {} if quiet else {**final},
        "peak_memory_bytes": 7,
        **({} if quiet else sent),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _write(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def _table(plan: BenchPlan, **folders: Path) -> tuple[BenchTable, dict[str, Row]]:
    made = table_of(plan, {row: Outcomes({0: folder}, {}) for row, folder in folders.items()})
    return made, {row.name: row for row in made.rows}


def test_a_share_has_the_interval_of_its_own_splits_rows(tmp_path: Path) -> None:
    names = ["test/accuracy", "validation/accuracy"]
    plan = BenchPlan("t", methods={"a": None}, seeds=[0], baselines=[], metrics=names)
    final = {"test/accuracy": 0.3, "validation/accuracy": 0.5}
    _, rows = _table(plan, a=_run(tmp_path / "a", final))
    for row, shares in (("a", final), ("before training", _ENDS[0])):
        for (name, share), num in zip(shares.items(), (10, 40), strict=True):
            found = rows[row].estimates[name]
            assert (found.low, found.high) == pytest.approx(wilson(round(share * num), num))


def test_a_run_that_tells_nothing_takes_no_column_from_others(tmp_path: Path) -> None:
    plan = BenchPlan("t", methods={"a": None, "b": None}, seeds=[0], baselines=[])
    a = _run(tmp_path / "a", {"test/accuracy": 0.3})
    made, rows = _table(plan, a=a, b=_run(tmp_path / "b", {}, quiet=True))
    assert [metric.name for metric in made.metrics] == ["test/accuracy"]
    assert not rows["b"].estimates
    assert not rows["b"].seconds
    assert rows["a"].seconds == {"train": 1.0, "evaluation": 2.0}
    files = write_all(made, tmp_path, _MACHINE)
    assert "- b: what its clients measure is kept out" in files["table.md"].read_text()
    assert "- a:" not in files["table.md"].read_text()


def test_what_is_measured_around_an_emulator_is_told_from_the_whole_model(tmp_path: Path) -> None:
    plan = BenchPlan("t", methods={"a": None, "b": None}, seeds=[0], baselines=[])
    both = {"test/loss": 2.0, "test/plugin/loss": 3.0}
    a, b = _run(tmp_path / "a", {"test/loss": 2.5}), _run(tmp_path / "b", both)
    made, rows = _table(plan, a=a, b=b)
    assert [rows[name].emulated for name in "ab"] == [[], ["Test loss"]]
    assert (
        "b: Test loss with the emulator"
        in write_all(made, tmp_path, _MACHINE)["table.md"].read_text()
    )
    whole = BenchPlan(
        "t", methods={"b": None}, seeds=[0], baselines=[], metrics=["test/plugin/loss"]
    )
    assert _table(whole, b=b)[1]["b"].emulated == []


def test_without_test_rows_the_validation_loss_is_compared(tmp_path: Path) -> None:
    plan = BenchPlan("t", methods={"a": None}, seeds=[0], baselines=[])
    a = _run(tmp_path / "a", {"validation/loss": 2.0, "validation/token_accuracy": 0.5})
    assert [metric.name for metric in _table(plan, a=a)[0].metrics] == ["validation/loss"]


def test_each_rows_own_metrics_are_known_and_a_method_called_local_sends(tmp_path: Path) -> None:
    names = ["test/accuracy", "test/mine"]
    plan = BenchPlan(
        "t", methods={"a": None, "local": None}, seeds=[0], baselines=[], metrics=names
    )
    final = {"test/accuracy": 0.4, "test/mine": 0.7}
    local = _run(tmp_path / "local", final, metrics=["exact_match", _MINE])
    made, rows = _table(plan, a=_run(tmp_path / "a", {"test/accuracy": 0.3}), local=local)
    assert (made.metrics[1].title, made.metrics[1].is_share) == ("Test my own", True)
    assert rows["local"].bytes == 8.0
    alone = BenchPlan("t", methods={"a": None}, seeds=[0], baselines=["local"])
    assert _table(alone, a=tmp_path / "a", local=local)[1]["local"].bytes is None


def test_names_mean_nothing_to_latex_and_markdown(tmp_path: Path) -> None:
    names = ["a", "[a] <b>", "* b | c"]
    plan = BenchPlan("t", methods=dict.fromkeys(names), seeds=[0, 1], baselines=[])
    runs = {name: _run(tmp_path / str(at), _ENDS[1]) for at, name in enumerate(names)}
    made = table_of(plan, {n: Outcomes({0: runs[n]}, {1: "so it is"}) for n in names})
    files = write_all(made, tmp_path, _MACHINE)
    text = files["table.tex"].read_text()
    # Behind a line's end "[" is a length and "*" forbids a page to end there.
    assert "\n    {[}a] \\textless{}b\\textgreater{} & 1 of 2 &" in text
    assert "\n    {*} b \\textbar{} c & 1 of 2 &" in text
    assert "a, seed 1, failed: so it is. {[}a]" in text
    assert r"| [a] \<b> | 1 of 2 |" in files["table.md"].read_text()
    assert r"- \* b \| c, seed 1, failed: so it is" in files["table.md"].read_text()


def test_the_model_before_training_is_asked_though_clients_have_models_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"passage": "It is cold.", "question": "is it", "answer": true}\n')
    plan = BenchPlan("t", methods={"a": None}, seeds=[0], suites={"boolq": str(questions)})
    monkeypatch.setattr("fedloom.benchmark.suites.is_shared", lambda _: False)
    assert is_asked(plan, tmp_path, base=False)
    # A plan that was stopped right after the run goes on to ask it.
    assert not is_asked(plan, tmp_path, base=True)
    sha, file = shown_sha256(plan.asked()[0]), plan.asked()[0].source.sha256
    keep(tmp_path, [SuiteResult("boolq", BASE, 1, {"a": 1.0}, 0.2, 1.0, [1.0], 0, sha, file, 0.0)])
    assert is_asked(plan, tmp_path, base=True)
    assert [*results_of(plan, tmp_path, base=True)] == ["suite/boolq"]
    # What is right has changed: it is asked again, though it reads the same.
    questions.write_text(questions.read_text().replace("true", "false"))
    assert shown_sha256(plan.asked()[0]) == sha
    assert not is_asked(plan, tmp_path, base=True)
