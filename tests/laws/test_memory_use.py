"""Memory does not grow with the population: unselected clients are on disk, and a cohort shares one base."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.engines.inprocess import InProcess
from fedloom.server.samplers import Full


def peak(folder: Path, num_clients: int) -> int:
    """Return the peak memory of a whole run in a process of its own, in bytes."""
    overrides = [
        f"data.num_clients={num_clients}",
        "data.num_examples=2400",
        "data.partition=iid",
        "cohort.uniform.size=4",
        "local.steps=4",
        "local.batch_size=4",
        "run.rounds=6",
        "run.baselines=[]",
        "run.samples=0",
        "evaluation.every=0",
        "evaluation.generate=false",
        "evaluation.validation=false",
    ]
    command = [
        sys.executable,
        "-m",
        "fedloom.cli",
        "run",
        "ditto",
        *overrides,
        "--out",
        str(folder),
    ]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert not done.returncode, done.stderr
    return int(json.loads((folder / "summary.json").read_text())["peak_memory_bytes"])


@pytest.mark.slow
def test_two_hundred_clients_take_the_memory_of_four(tmp_path: Path) -> None:
    """The same cohort and the same amount of text, Ditto, whose clients keep a model each."""
    few, many = peak(tmp_path / "few", 4), peak(tmp_path / "many", 200)
    assert many < 1.05 * few, f"{many / 1e6:.0f} MB against {few / 1e6:.0f} MB"


@pytest.mark.slow
def test_fifty_rounds_do_not_leak(bench, tmp_path: Path) -> None:
    """Issue 775 of the reference: resident memory stays where it was once caches are warm."""
    it = bench(steps=1)
    engine = it.engine(InProcess, Ditto(FedAvg(), steps=1), tmp_path)
    run, _ = it.rounds(Ditto(FedAvg(), steps=1), engine, 60, sampler=Full())
    process = psutil.Process()
    before = process.memory_info().rss
    for number in range(61, 111):
        run, _ = it.rounds(Ditto(FedAvg(), steps=1), engine, number, run=run, sampler=Full())
        engine.store.prune(below=number)
    assert process.memory_info().rss - before < 3_000_000
