"""Code of other packages: by import path or entry point, in one sentence where it cannot be had, and only where allowed."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedloom import plugins
from fedloom.algorithms import ALGORITHMS
from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.protocols import Algorithm
from fedloom.plugins import find, limited_to, load, plugged

METHODS = """
import pathlib
from dataclasses import dataclass
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.ditto import Ditto
pathlib.Path(__file__).with_suffix(".ran").touch()

@dataclass(frozen=True)
class MyMethod(FedAvg):
    '''FedAvg under another name.'''
    strength: float = 1.0

class Outer:
    @dataclass(frozen=True)
    class Inner(FedAvg):
        pass

@dataclass
class Loose:
    lr: float = 1.0

@dataclass(frozen=True)
class Unfinished:
    lr: float = 1.0
    def init(self, params, seed): ...

class Plain:
    pass

def function():
    pass
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of a package, my_lab, whose modules leave a file beside them when they are imported."""
    folder = tmp_path / "installed" / "my_lab"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "methods.py").write_text(METHODS)
    (folder / "broken.py").write_text("raise RuntimeError('no such card')")
    (folder / "hungry.py").write_text("import cupboard")
    (folder / "hidden.py").write_text(
        "from __future__ import annotations\nfrom my_lab.methods import MyMethod, dataclass, FedAvg\n"
        "@dataclass(frozen=True)\nclass Hidden(FedAvg):\n    on: Thing = None\n"
    )
    monkeypatch.syspath_prepend(str(folder.parent))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[name]


def test_a_class_is_found_by_its_import_path(lab: Path) -> None:
    for path in ("my_lab.methods:MyMethod", "my_lab.methods:Outer.Inner"):
        kind = load(path, Algorithm)
        assert issubclass(kind, FedAvg)
        assert plugins.path_of(kind) == path


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("your_lab:X", "your_lab:X: there is no module your_lab: install its package, or put its"),
        ("my_lab.none:X", "there is no module my_lab.none"),
        ("my_lab.hungry:X", "my_lab.hungry needs cupboard, which is not installed"),
        ("my_lab.broken:X", "importing my_lab.broken raised RuntimeError: no such card"),
        ("my_lab.methods:X", "the module my_lab.methods has no X"),
        ("my_lab.methods:Plain", "my_lab.methods:Plain is no dataclass"),
        ("my_lab.methods:function", "my_lab.methods:function is no dataclass"),
        ("my_lab.methods:Loose", "Loose is not frozen: write @dataclass"),
        ("my_lab.methods:Unfinished", "has no server_sees and no broadcast and no client_update"),
        ("my_lab.hidden:Hidden", "the type of a field cannot be read .name 'Thing' is not defined"),
        ("my lab:X", "an import path looks like my_lab.methods:MyMethod, got 'my lab:X'"),
        ("my_lab.methods:", "an import path looks like"),
        ("__main__:X", "__main__:X exists only in the program that defines it"),
        ("my_lab.methods:f.<locals>.X", "exists only in the program that defines it"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(path: str, said: str, lab: Path) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        load(path, Algorithm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "allowed", ["my_lab", "my_lab.methods", "my_lab.methods:MyMethod"], ids=str
)
def test_what_is_allowed_by_name_is_imported(allowed: str, lab: Path) -> None:
    with limited_to(["another", allowed]):
        load("my_lab.methods:MyMethod", Algorithm)


@pytest.mark.parametrize(
    "allowed",
    [[], ["my"], ["my_la"], ["my_lab.method"], ["my_lab.methods.more"], ["my_lab.methods:My"]],
    ids=str,
)
def test_what_is_not_allowed_is_refused_before_it_is_imported(
    allowed: list[str], lab: Path
) -> None:
    with (
        limited_to(allowed),
        pytest.raises(ValueError, match=r"fedloom join --allow my_lab.methods"),
    ):
        load("my_lab.methods:MyMethod", Algorithm)
    assert "my_lab" not in sys.modules
    assert not (lab / "methods.ran").exists()
    load("my_lab.methods:MyMethod", Algorithm)
    assert (lab / "methods.ran").exists(), "importing it would have been seen"


def test_what_an_allowed_module_has_from_elsewhere_is_not_allowed_with_it(lab: Path) -> None:
    with limited_to(["my_lab.hidden"]), pytest.raises(ValueError, match=r"my_lab.methods:MyMethod"):
        load("my_lab.hidden:MyMethod", Algorithm)


def test_a_module_that_is_loaded_already_is_refused_all_the_same(lab: Path) -> None:
    load("my_lab.methods:MyMethod", Algorithm)
    with limited_to([]), pytest.raises(ValueError, match="this site allows none such"):
        load("my_lab.methods:MyMethod", Algorithm)


@pytest.fixture
def installed(lab: Path) -> Iterator[Callable[..., None]]:
    """Return `installed(NAME="module:Class")`: what a package with these entry points would give."""

    def install(distribution: str = "my_lab", **points: str) -> None:
        folder = lab.parent / f"{distribution}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        )
        lines = "\n".join(f"{name} = {path}" for name, path in points.items())
        (folder / "entry_points.txt").write_text(f"[fedloom.algorithms]\n{lines}\n")
        plugins._entry_points.cache_clear()

    yield install
    plugins._entry_points.cache_clear()


GROUP: dict[str, Any] = {"group": "fedloom.algorithms", "own": ALGORITHMS}


def test_a_bare_name_is_looked_up_among_entry_points(installed: Callable[..., None]) -> None:
    installed(mymethod="my_lab.methods:MyMethod")
    kind = plugged("mymethod", Algorithm, **GROUP)
    assert kind is not None
    assert plugins.path_of(kind) == "my_lab.methods:MyMethod"
    assert plugged("fedavg", Algorithm, **GROUP) is None
    assert plugged("nobodys", Algorithm, **GROUP) is None
    with limited_to([]), pytest.raises(ValueError, match=r"--allow my_lab.methods"):
        plugged("mymethod", Algorithm, **GROUP)


def test_one_of_our_own_names_is_nobody_elses(installed: Callable[..., None], lab: Path) -> None:
    installed(fedavg="my_lab.methods:MyMethod")
    with pytest.raises(ValueError, match="fedavg is fedloom's own, but an installed package gives"):
        plugged("fedavg", Algorithm, **GROUP)
    assert not (lab / "methods.ran").exists()


def test_a_name_that_two_packages_give_is_no_name(installed: Callable[..., None]) -> None:
    installed(mine="my_lab.methods:MyMethod")
    installed("other_lab", mine="my_lab.methods:Outer.Inner")
    with pytest.raises(ValueError, match=r"mine is given by two packages: write my_lab.methods:MyM"):
        find("mine", **GROUP)
