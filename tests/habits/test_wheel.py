"""The wheel holds all that a run needs: it is built, installed into an empty environment and used from there."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEGABYTES = 12
RUN = """
import json
from pathlib import Path

import fedloom

result = fedloom.run("quickstart", "run", overrides=%r)
print(json.dumps({
    "home": str(Path(fedloom.__file__).parent),
    "loss": result.summary["final"]["test/loss"],
    "report": result.report.stat().st_size,
}))
"""
SMALL = [
    "data.num_examples=240",
    "run.rounds=1",
    "run.baselines=[]",
    "local.steps=1",
    "evaluation.max_examples=2",
    "evaluation.max_new_tokens=2",
]

pytestmark = pytest.mark.slow


def said(*command: str | Path, folder: Path) -> str:
    """Return what a command prints where this checkout is not in the path."""
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=here, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*words: str | Path) -> None:
    """Run pip, which asks no index."""
    subprocess.run([sys.executable, "-m", "pip", "-q", *map(str, words), "--no-index"], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built as `make dist` does."""
    pytest.importorskip("hatchling", reason="the tools of the extra `dev` are not installed")
    folder = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_is_small_and_holds_what_the_package_holds(wheel: Path):
    assert wheel.stat().st_size < MEGABYTES * 1e6
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("fedloom/")}
    source = ROOT / "src"
    files = {p for p in source.rglob("*") if p.is_file() and p.parent.name != "__pycache__"}
    assert packed == {str(p.relative_to(source)) for p in files if p.suffix != ".pyc"}
    assert "fedloom/py.typed" in packed


def test_it_runs_in_an_environment_that_has_nothing_but_its_dependencies(
    wheel: Path, tmp_path: Path
):
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip("--python", python, "install", "--no-deps", wheel)
    # The dependencies as plain files: what else is installed beside them, such as a checkout of this package, stays out.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert "quickstart" in said(environment / "bin" / "fedloom", "recipes", "ls", folder=elsewhere)
    found = json.loads(said(python, "-c", RUN % SMALL, folder=elsewhere).splitlines()[-1])
    assert Path(found["home"]) == packages / "fedloom"
    assert found["loss"] > 0
    assert found["report"] > 10_000
