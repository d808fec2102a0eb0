"""The examples run as a reader would run them, and print what they are there to show."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedloom.testing import examination

FOLDER = Path(__file__).parents[1] / "examples"
Ran = Callable[[str], str]


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ran:
    """Return a function that runs an example in an empty folder and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> str:
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        module.main()
        return capfd.readouterr().out

    return run


def losses(printed: str) -> dict[str, list[float]]:
    """Return the losses of each line `NAME test loss a -> b`."""
    lines = re.findall(r"^(\w*) *test loss (.+)$", printed, re.M)
    return {name: [float(loss) for loss in text.split(" -> ")] for name, text in lines}


def test_every_example_is_run_here_and_named_in_the_readme():
    here, readme = Path(__file__).read_text(), (FOLDER.parent / "README.md").read_text()
    # A plan is no program: the README's commands run it.
    for path in FOLDER.glob("[!_]*.[!y]*"):
        assert f'"{path.stem}' in here
        assert f"examples/{path.name}" in readme


@pytest.mark.slow
def test_a_method_of_ones_own_keeps_the_laws_and_is_run_beside_fedavg(ran: Ran):
    printed = ran("own_algorithm")
    # Its server reads more than a mean, so nothing is said of answers that are late.
    held = [law for law in examination.LAWS if law != "lateness"]
    assert printed.startswith("laws that hold: " + ", ".join(held) + "\n")
    steps = re.search(r"server steps \[(.+)\]", printed)
    assert steps
    assert all(float(step) >= 1 for step in steps[1].split(", "))
    assert {"FedExP", "fedavg"} == losses(printed).keys()


@pytest.mark.slow
def test_rows_model_metric_and_callback_of_ones_own(ran: Ran):
    printed = ran("own_data")
    assert "round 1: training loss" in printed
    assert "round 8" not in printed, "the callback stops the run once all is learnt"
    assert "error rate 0.00" in printed


@pytest.mark.slow
def test_clients_of_a_language_find_each_other_and_gain_by_it(ran: Ran):
    printed = ran("clusters")
    spoken = re.findall(r"(cluster-\d): \S+ speaks (\w+)", printed)
    assert len(spoken) == 6
    assert len({cluster for cluster, _ in spoken}) == len(set(spoken)) == 3
    found = losses(printed)
    assert found["clustered"] < found["fedavg"]


@pytest.mark.slow
def test_trl_is_the_local_trainer_of_two_clients_and_losses_fall(ran: Ran):
    pytest.importorskip("trl", reason="the extra `trl` is not installed")
    printed = ran("trl_local_trainer")
    found = losses(printed)
    assert found.keys() == {"fedloom", "TRL"}
    for course in found.values():
        assert len(course) == 3
        assert course == sorted(course, reverse=True)
    assert re.search(r"with TRL [\d.]+ s \([\d.]+x\)", printed)


@pytest.mark.slow
@pytest.mark.flower
@pytest.mark.timeout(900)
def test_three_sites_federate_on_one_machine(ran: Ran):
    pytest.importorskip("flwr", reason="the extra `flower` is not installed")
    printed = ran("three_sites")
    assert "3 sites, 2 rounds" in printed
    before, after = losses(printed)[""]
    assert after < before


def notebook() -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((FOLDER / "notebook.ipynb").read_text())["cells"]
    return cells


def test_the_notebook_is_one_of_the_fourth_format_without_outputs():
    whole = json.loads((FOLDER / "notebook.ipynb").read_text())
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    for cell in whole["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.slow
def test_the_cells_of_the_notebook_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    module = ModuleType("notebook_cells")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for cell in notebook():
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), vars(module))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "1",
        "2",
        "3",
        "4",
    ]
    summary = vars(module)["result"].summary
    assert summary["final"]["test/loss"] < summary["before"]["test/loss"]
    assert summary["final"]["test/error"] < 1
    assert vars(module)["opened"].report.exists()
