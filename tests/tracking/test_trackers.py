import json
import math
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from fedloom.tracking.records import JsonLines
from fedloom.tracking.trackers import TRACKERS, make_trackers

Calls = list[tuple[Any, ...]]


def test_a_line_a_round_is_readable_at_once(tmp_path: Path) -> None:
    (jsonl,) = make_trackers(tmp_path, (), name="demo")
    jsonl.log(1, {"train/loss": 2.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"round": 1, "train/loss": 2.5}\n'
    jsonl.log(2, {"train/loss": math.nan, "test/perplexity": math.inf})
    jsonl.finish({})
    assert JsonLines(tmp_path / "metrics.jsonl").rows()[1] == {
        "round": 2,
        "train/loss": None,
        "test/perplexity": None,
    }


def test_a_resumed_run_forgets_the_rounds_beyond_its_checkpoint(tmp_path: Path) -> None:
    (jsonl,) = make_trackers(tmp_path, (), name="demo")
    for number in range(5):
        jsonl.log(number, {"x": float(number)})
    jsonl.truncate_after(2)
    jsonl.log(3, {"x": 30.0})
    rows = JsonLines(tmp_path / "metrics.jsonl").rows()
    assert [(row["round"], row["x"]) for row in rows] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    jsonl.truncate_after(-1)
    assert JsonLines(tmp_path / "metrics.jsonl").rows() == []
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_short_by_a_kill_is_left_out_and_cut_away(tmp_path: Path) -> None:
    path = tmp_path / "clients.jsonl"
    JsonLines(path).append(
        {"round": 1, "client": name, "metrics": {"loss": math.nan}} for name in "ab"
    )
    whole = path.read_text()
    with path.open("a") as file:
        file.write('{"round": 2, "cli')
    assert [row["client"] for row in JsonLines(path).rows()] == ["a", "b"]
    JsonLines(path).truncate_after(2)
    assert path.read_text() == whole
    assert json.loads(whole.splitlines()[0])["metrics"] == {"loss": None}


def test_damage_in_the_middle_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is not JSON: remove it, or"):
        JsonLines(path).rows()


def test_a_file_that_is_not_there_has_no_rows(tmp_path: Path) -> None:
    JsonLines(tmp_path / "none.jsonl").truncate_after(3)
    assert JsonLines(tmp_path / "none.jsonl").rows() == []
    assert not list(tmp_path.iterdir())


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"run\.trackers may hold tensorboard, wandb, mlflow, trackio, got 'jsonl' "
        r"\(metrics\.jsonl is always written\)",
    ):
        make_trackers(tmp_path, ["jsonl"], name="demo")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_names_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom.tracking.trackers.find_spec", lambda _: None)
    with pytest.raises(
        ValueError,
        match=rf"run\.trackers names {name}, which is not installed: pip install "
        r"fedloom\[trackers\]",
    ):
        make_trackers(tmp_path, [name], name="demo")
    assert not list(tmp_path.iterdir())


class Recorder:
    """Writes down every call, whatever its name; calls return the recorder."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.summary: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> "Recorder":
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., types.ModuleType]:
    def install(name: str, **content: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def run_twice(folder: Path, name: str) -> None:
    """Log round 1, die, resume, log it again, finish."""
    (folder / "recipe.yaml").write_text("name: demo\nlocal: {lr: 0.1}\n")
    for _ in range(2):
        _, tracker = make_trackers(folder, [name], name="demo")
        tracker.truncate_after(0)
        tracker.log(1, {"test/loss": 2.0})
    tracker.finish({"final": {"test/loss": 2.0}})


def test_tensorboard_drops_lost_rounds_and_keeps_the_recipe(
    tmp_path: Path, installed: Callable[..., Any]
) -> None:
    calls: Calls = []
    installed("tensorboard")

    def writer(**settings: Any) -> Recorder:
        calls.append(("open", (), settings))
        return Recorder(calls)

    installed("torch.utils.tensorboard", SummaryWriter=writer)
    run_twice(tmp_path, "tensorboard")
    folder = str(tmp_path / "tensorboard")
    assert calls.count(("open", (), {"log_dir": folder, "purge_step": 1})) == 2
    assert calls.count(("add_scalar", ("test/loss", 2.0, 1), {})) == 2
    texts = {args[0]: args[1] for name, args, _ in calls if name == "add_text"}
    assert '"lr": 0.1' in texts["recipe"]
    assert '"test/loss": 2.0' in texts["summary"]
    assert calls[-1][0] == "close"


def test_wandb_resumes_the_same_run(tmp_path: Path, installed: Callable[..., Any]) -> None:
    calls: Calls = []
    recorder = Recorder(calls)
    installed("wandb", init=recorder.init)
    run_twice(tmp_path, "wandb")
    opened = [settings for name, _, settings in calls if name == "init"]
    assert opened[0] == opened[1]
    assert opened[0]["resume"] == "allow"
    assert opened[0]["id"] == (tmp_path / "wandb_run_id").read_text()
    assert opened[0]["config"] == {"name": "demo", "local": {"lr": 0.1}}
    assert ("log", ({"round": 1, "test/loss": 2.0},), {}) in calls
    assert recorder.summary == {"final.test/loss": 2.0}
    assert calls[-1][0] == "finish"


@pytest.mark.parametrize("known", [True, False])
def test_mlflow_resumes_the_same_run(
    known: bool, tmp_path: Path, installed: Callable[..., Any]
) -> None:
    calls: Calls = []

    class Client(Recorder):
        def get_experiment_by_name(self, name: str) -> Any:
            return types.SimpleNamespace(experiment_id="7") if known else None

        def create_experiment(self, name: str) -> str:
            return "8"

        def create_run(self, experiment: str, *, run_name: str) -> Any:
            calls.append(("create_run", (experiment, run_name), {}))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    installed("mlflow", MlflowClient=lambda: Client(calls))
    run_twice(tmp_path, "mlflow")
    created = [call for call in calls if call[0] == "create_run"]
    assert created == [("create_run", ("7" if known else "8", "demo"), {})]
    assert calls.count(("log_metric", ("r1", "test/loss", 2.0), {"step": 1})) == 2
    assert ("set_tag", ("r1", "summary.final.test/loss", "2.0"), {}) in calls
    assert calls[-1] == ("set_terminated", ("r1",), {})


def test_trackio_resumes_the_same_run(tmp_path: Path, installed: Callable[..., Any]) -> None:
    calls: Calls = []
    installed("trackio", init=Recorder(calls).init)
    run_twice(tmp_path, "trackio")
    names = {settings["name"] for name, _, settings in calls if name == "init"}
    assert len(names) == 1
    assert names.pop().startswith("demo-")
    assert calls.count(("log", ({"test/loss": 2.0},), {"step": 1})) == 2
    assert calls[-1][0] == "finish"
