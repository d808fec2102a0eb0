"""How far evidence is believed follows from rows whose cluster is known."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import experiment
from fedloom.results.calibration import FILE, Calibration, Calibrations
from fedloom.results.route import Router, calibrate
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import build

HALVES = torch.tensor([0.5, 0.5], dtype=torch.float64)


def drawn(temperature: float, *, clients: int, rows: int, repeated: bool) -> tuple[Any, list[int]]:
    """Draw clients of two clusters whose rows say `temperature` times the true log-odds, each row its own or all the same."""
    noise = torch.Generator().manual_seed(0)
    truth = [at % 2 for at in range(clients)]
    sign = 1 - 2 * torch.tensor(truth, dtype=torch.float64)[:, None]
    # Log-odds of two normals at distance 1: normal, with half their variance as their mean.
    shape = (clients, 1 if repeated else rows)
    odds = 0.5 * sign + torch.randn(shape, generator=noise, dtype=torch.float64)
    odds = odds.expand(clients, rows)
    return temperature * torch.stack((odds, torch.zeros_like(odds)), 2), truth


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_how_much_too_sure_models_are(temperature: float) -> None:
    evidence, truth = drawn(temperature, clients=2000, rows=4, repeated=False)
    fitted = Calibration.fit(evidence, HALVES, truth)
    assert fitted.temperature == pytest.approx(temperature, rel=0.12)
    assert fitted.dependence < 0.05
    assert fitted.of(4) == pytest.approx(temperature, rel=0.2)


def test_rows_that_repeat_one_another_count_once() -> None:
    evidence, truth = drawn(1.0, clients=2000, rows=4, repeated=True)
    fitted = Calibration.fit(evidence, HALVES, truth)
    assert fitted.temperature == pytest.approx(1.0, rel=0.12)
    assert fitted.dependence == pytest.approx(1.0, abs=0.1)
    assert fitted.of(4) == pytest.approx(4 * fitted.temperature, rel=0.1)


def test_the_temperature_of_more_rows_grows_by_what_they_repeat() -> None:
    assert Calibration(2.0, 0.25).of(1) == 2.0
    assert Calibration(2.0, 0.25).of(5) == 4.0
    assert Calibration().of(16) == 1.0


def test_models_that_are_always_right_are_not_believed_without_end() -> None:
    sure = torch.tensor([[[9.0, 0.0]], [[0.0, 9.0]]], dtype=torch.float64)
    assert Calibration.fit(sure, HALVES, [0, 1]).temperature > 0.5


def test_a_file_of_calibrations_is_read_back_or_refused(tmp_path: Path) -> None:
    assert Calibrations.read(tmp_path) == Calibrations()
    written = Calibrations(Calibration(2.0, 0.5), Calibration(0.75, 0.0))
    written.write(tmp_path)
    assert Calibrations.read(tmp_path) == written
    for text, message in (
        ("{}", r"routing\.json must hold temperature and dependence"),
        (
            (tmp_path / FILE).read_text().replace("2.0", "-2.0"),
            r"routing\.json must hold temperatures above 0",
        ),
    ):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ValueError, match=message):
            Calibrations.read(tmp_path)


def test_a_run_with_clusters_leaves_how_far_its_routes_are_believed(
    small_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    mode = {"random": {"num_clusters": 2}}
    recipe = small_recipe(algorithm=[{"clustered": {"mode": mode}}, "fedavg"])
    experiment.run(recipe, tmp_path / "run")
    session = build(recipe, tmp_path / "run")
    run = last_run(session)
    found = Calibrations.read(session.folder)
    assert found == calibrate(session, run)
    route = Router.of(session, run).route(["Hello", "And now?"])
    assert route.temperature == found.prompts.of(2)
    odds = math.log(route.posterior["cluster-0"] / route.posterior["cluster-1"])
    apart = route.evidence["cluster-0"] - route.evidence["cluster-1"]
    assert odds == pytest.approx(apart / route.temperature, abs=1e-9)


def test_a_run_without_clusters_leaves_nothing_to_believe(
    small_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    experiment.run(small_recipe(), tmp_path / "run")
    assert not (tmp_path / "run" / FILE).exists()
