"""What a run left behind, asked from Python."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom import experiment
from fedloom.result import Result, open_run
from fedloom.results.records import Records

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def finished(small_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Return the result of a run in which every client has a model of its own, with a baseline that shares one."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    recipe = small_recipe(
        algorithm=[{"ditto": {"steps": 1}}, "fedavg"],
        run={"rounds": 2, "samples": 0, "baselines": ["fedavg"]},
        evaluation={"every": 1, "max_examples": 2},
    )
    result: Result = experiment.run(recipe, folder)
    return result


def test_numbers_are_records(finished: Result) -> None:
    assert [record["round"] for record in finished.metrics] == [0, 1, 2]
    assert finished.metrics[2]["test/loss"] == finished.summary["final"]["test/loss"]
    last = [r for r in finished.clients if r["round"] == 2 and r["split"] == "test"]
    assert len(last) == finished.summary["num_clients"]
    assert all(record["loss"] > 0 for record in last)


def test_records_are_a_table_where_pandas_is_installed(finished: Result) -> None:
    pytest.importorskip("pandas")
    table = finished.metrics.to_pandas()
    assert list(table["round"]) == [0, 1, 2]
    assert table["train/loss"].isna().tolist() == [True, False, False]


def test_records_without_pandas_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("fedloom.results.records.import_module", missing)
    with pytest.raises(ValueError, match="to_pandas needs pandas, which is not installed"):
        Records([{"round": 0}]).to_pandas()


def test_a_baseline_is_a_result_of_its_own(finished: Result) -> None:
    assert finished.baselines.keys() == {"fedavg"}
    other = finished.baselines["fedavg"]
    assert other.summary["algorithm"] == "FedAvg"
    assert other.adapter().name == "global"
    assert other.evaluate().round == 2


def test_a_client_finds_its_adapter(finished: Result) -> None:
    adapter = finished.adapter("client-001")
    assert (adapter / "adapter_model.safetensors").is_file()
    assert adapter != finished.adapter("client-002")
    with pytest.raises(ValueError, match=r"client must be one of client-000, .*, got 'client-009'"):
        finished.adapter("client-009")
    with pytest.raises(ValueError, match=r"client must be one of client-000, .*, got None"):
        finished.adapter()


def test_a_run_that_is_opened_again_measures_as_the_run_did(finished: Result) -> None:
    measured = open_run(finished.folder).evaluate()
    assert measured.metrics["loss"] == pytest.approx(finished.summary["final"]["test/loss"])
    assert measured.round == 2
    assert "client-003" in str(measured.table().columns[0]._cells)


def test_it_answers(finished: Result) -> None:
    talk = open_run(finished.folder).chat("client-001")
    assert isinstance(talk.answer("hi"), str)
    assert [message.role for message in talk.messages] == ["user", "assistant"]


def test_it_exports_where_it_is_told(finished: Result, tmp_path: Path) -> None:
    written = finished.export(tmp_path / "out")
    assert (written["client-001"] / "README.md").is_file()
    routing = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert routing["clients"]["client-001"] == "client-001"
    assert routing["models"]["client-001"] == {
        "path": "client-001",
        "num_clients": 1,
        "share": 0.25,
    }
    assert "fedloom route RUN EXAMPLES" in routing["newcomers"]["why"]


def test_what_is_no_run_or_no_finished_one_is_a_sentence(finished: Result, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        open_run(tmp_path)
    copied = shutil.copytree(finished.folder, tmp_path / "run")
    (copied / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"its run is not finished: fedloom\.run with the same"):
        _ = open_run(copied).summary
    with pytest.raises(ValueError, match="trainer must be a Trainer"):
        open_run(finished.folder, trainer=3)
