"""The package starts fast and shows what it means to show (CPU seconds: a busy machine does not count)."""

import importlib
import subprocess
import sys

import pytest

import fedloom

HEAVY = ("transformers", "peft", "datasets", "matplotlib", "pandas", "sklearn", "scipy", "jinja2")
REPORT = """
import os, sys
print(os.times().user + os.times().system)
print(*sorted(set(sys.modules) & {heavy!r}))
"""


def child(code: str) -> tuple[float, list[str]]:
    """Return the CPU seconds of a fresh interpreter that runs `code`, and the heavy packages it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", code + REPORT.format(heavy=set(HEAVY))],
        capture_output=True,
        text=True,
        check=True,
    )
    *_, seconds, heavy = done.stdout.split("\n")[:-1]
    return float(seconds), heavy.split()


def quickest(code: str) -> tuple[float, list[str]]:
    """Return the least of three: the first may compile, and a neighbour may hold the caches."""
    return min(child(code) for _ in range(3))


def test_importing_the_package_takes_less_than_a_second_and_loads_no_model_library():
    seconds, heavy = quickest("import fedloom")
    assert not heavy
    assert seconds < 1


def test_help_takes_less_than_a_second_and_loads_no_model_library():
    code = """
import sys
from fedloom.cli import main
sys.argv = ["fedloom", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    seconds, heavy = quickest(code)
    assert not heavy
    assert seconds < 1


def test_a_site_that_joins_has_no_torch_beside_its_worker_s():
    code = """
import sys
from fedloom.cli import main
sys.argv = ["fedloom", "join", "127.0.0.1:1", "--name", "alba", "--keys", "none", "--data", sys.executable]
try:
    main()
except SystemExit as end:
    assert end.code == 2, end.code
assert "fedloom.deploy.join" in sys.modules
assert "torch" not in sys.modules
"""
    seconds, heavy = quickest(code)
    assert not heavy
    assert seconds < 1


def test_every_public_name_is_there():
    assert fedloom.__all__
    assert len(fedloom.__all__) == len(set(fedloom.__all__))
    for name in fedloom.__all__:
        assert getattr(fedloom, name) is not None


def test_what_is_not_public_is_refused():
    assert "fit" not in fedloom.__all__
    with pytest.raises(AttributeError, match="fit"):
        getattr(fedloom, "fit")  # noqa: B009 - mypy knows that it is not there


@pytest.mark.parametrize("module", ["fedloom.core.protocols", "fedloom.core.params"])
def test_only_the_top_package_declares_all(module: str):
    assert "__all__" not in vars(importlib.import_module(module))
