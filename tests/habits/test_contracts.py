"""The layers hold, and the contracts that say so can tell."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BREACHES = {
    "imports point down": ("core/randomness.py", "import fedloom.server"),
    "engines and rounds know no algorithm": ("rounds/loop.py", "import fedloom.algorithms.fedavg"),
    "algorithms are independent": (
        "algorithms/scaffold.py",
        "from fedloom.algorithms.fedavg import FedAvg",
    ),
    "algorithms know core, privacy, server and clustering only": (
        "algorithms/fedavg.py",
        "import fedloom.client.fit",
    ),
    "core needs torch and the standard library only": ("core/params.py", "import numpy"),
    "transformers, peft and gguf stay in models": ("client/fit.py", "import peft"),
    "dp-accounting stays in privacy": ("server/samplers.py", "import dp_accounting"),
    "optuna stays in search.study": ("search/tune.py", "import optuna"),
    "datasets stays in data.sources": ("data/federation.py", "import datasets"),
    "pictures and pages stay in the report and the preview": (
        "client/fit.py",
        "import matplotlib.pyplot",
    ),
    "flwr stays in engines.flower, ray in engines.ray": ("engines/inprocess.py", "import flwr"),
    "cryptography stays with keys: secure.ciphers and engines.flower.keys": (
        "wire/frame.py",
        "import cryptography",
    ),
}


def lint(folder: Path) -> str:
    """Return what lint-imports says of the package below `folder`."""
    code = "import sys; from importlinter.cli import lint_imports_command as main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-logo", "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_every_contract_is_kept():
    said = lint(ROOT)
    assert f"Contracts: {len(BREACHES)} kept, 0 broken." in said, said


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return what is said of a copy of the package in which every contract is broken on purpose."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(
        ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
    )
    for file, line in BREACHES.values():
        path = folder / "src" / "fedloom" / file
        path.write_text(f"{path.read_text()}\n\ndef breach() -> None:\n    {line}\n")
    return lint(folder)


@pytest.mark.parametrize("contract", BREACHES)
def test_a_contract_sees_its_breach(broken: str, contract: str):
    assert f"{contract} BROKEN" in broken, broken
