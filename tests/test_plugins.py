"""Code of other packages: by import path or entry point, in one sentence where it cannot be had, and only where allowed."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import small_tree

import fedloom
from fedloom import cli, plugins
from fedloom.algorithms import ALGORITHMS
from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.protocols import Algorithm
from fedloom.data.data_settings import DataSettings
from fedloom.data.sources import take_rows
from fedloom.plugins import find, limited_to, load, plugged
from fedloom.recipe import RecipeError, apply_overrides, build_recipe, load_recipe
from fedloom.recipe_text import to_tree, to_yaml
from fedloom.server.optimizers import Adam


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
    with pytest.raises(
        ValueError, match=r"mine is given by two packages: write my_lab.methods:MyM"
    ):
        find("mine", **GROUP)


# --- in recipes -----------------------------------------------------------------------------------

SMALL = {
    "evaluation": {"every": 0, "generate": False, "validation": False},
    "run": {"rounds": 2, "samples": 0, "baselines": []},
    "local": {"steps": 1, "batch_size": 2},
    "cohort": {"uniform": {"size": 2}},
    "data": {"num_examples": 120, "num_clients": 3, "partition": "iid", "max_length": 192},
}


@pytest.mark.parametrize(
    ("text", "strength"),
    [
        ("algorithm: my_lab.methods:MyMethod", 1.0),
        ("algorithm: {my_lab.methods:MyMethod: {strength: 0.5}}", 0.5),
        ("algorithm: [ditto, {my_lab.methods:MyMethod: {strength: 0.5, server: adam}}]", 0.5),
        ("algorithm:\n  - ditto\n  - my_lab.methods:MyMethod:\n      strength: 2", 2.0),
    ],
)
def test_an_import_path_in_a_recipe_is_an_algorithm_and_reads_back_as_itself(
    text: str, strength: float, lab: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    recipe = load_recipe(file)
    inner: Any = recipe.algorithm
    inner = inner.inner if "ditto" in text else inner
    assert inner.strength == strength
    assert plugins.path_of(type(inner)) == "my_lab.methods:MyMethod"
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(recipe))
    assert load_recipe(again) == replace(recipe, name="mine")
    assert to_tree(recipe)["algorithm"][-1]["my_lab.methods:MyMethod"]["strength"] == strength


def test_wrappers_of_another_package_wrap_and_overrides_reach_into_them(lab: Path) -> None:
    tree = {"name": "x", "algorithm": ["my_lab.methods:MyWrapper", "my_lab.methods:MyMethod"]}
    overrides = [
        "algorithm.my_lab.methods:MyWrapper.strength=0.25",
        "algorithm.my_lab.methods:MyMethod.server.adam.lr=0.5",
    ]
    made: Any = build_recipe(apply_overrides(tree, overrides)).algorithm
    assert made.strength == 0.25
    assert made.inner.server == Adam(0.5)
    with pytest.raises(RecipeError, match="has no layer"):
        apply_overrides(tree, ["algorithm.my_lab.methods:None.strength=1"])


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ("your_lab:X", "^algorithm: your_lab:X: there is no module your_lab"),
        ("nobodys", "unknown name 'nobodys'; known: fedavg, "),
        (["my_lab.methods:MyWrapper"], "my_lab.methods:MyWrapper wraps another algorithm"),
        (["my_lab.methods:MyMethod", "fedavg"], "my_lab.methods:MyMethod wraps nothing"),
        ({"my_lab.methods:MyMethod": {"power": 1}}, "unknown key 'power' in `algorithm.my_l"),
        ({"my_lab.methods:MyMethod": {"strength": "much"}}, "MyMethod.strength: input should be"),
    ],
)
def test_a_mistake_in_one_is_a_sentence(algorithm: Any, said: str, lab: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        build_recipe({"name": "x", "algorithm": algorithm})


def test_a_name_that_a_package_gives_reads_back_as_its_import_path(
    installed: Callable[..., None],
) -> None:
    installed(mymethod="my_lab.methods:MyMethod")
    recipe = build_recipe({"name": "x", "algorithm": {"mymethod": {"strength": 3}}})
    assert list(to_tree(recipe)["algorithm"][0]) == ["my_lab.methods:MyMethod"]
    assert build_recipe(to_tree(recipe)) == recipe


@pytest.mark.slow
def test_every_command_works_with_an_algorithm_of_another_package(
    lab: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = {"algorithm": ["ditto", {"my_lab.methods:MyMethod": {"strength": 0.5}}], **SMALL}
    tree["model"] = {"name": str(tiny_folder)}
    Path("mine.yaml").write_text(yaml.safe_dump(tree))
    for command in (
        "plan mine.yaml",
        "data mine.yaml",
        "run mine.yaml run.rounds=1 --out out",
        "resume out run.rounds=2",
        "report out",
        "export out --out adapters",
    ):
        monkeypatch.setattr("sys.argv", ["fedloom", *command.split()])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, command
    assert "my_lab.methods:MyMethod" in Path("out/recipe.yaml").read_text()


# --- data sources -------------------------------------------------------------------------------


def test_a_function_of_another_package_is_a_data_source(lab: Path) -> None:
    (lab / "data.py").write_text(
        "from os.path import exists\n"
        "def rows(): return [{'prompt': f'{i}?', 'completion': 'yes'} for i in range(3)]\n"
        "def none(): return None\n"
        "def words(): return ['a']\n"
        "class Rows: pass\n"
    )
    taken = take_rows(DataSettings(source="my_lab.data:rows"))
    assert [row.values["prompt"] for row in taken.rows] == ["0?", "1?", "2?"]
    assert taken.rows[2].place == "my_lab.data:rows, row 3"
    for name, said in (
        ("none", "my_lab.data:none must return rows, got NoneType"),
        ("words", "must return rows that are mappings of columns by name, got str as row 1"),
        ("Rows", "my_lab.data:Rows is no function"),
        ("more", "the module my_lab.data has no more"),
    ):
        with pytest.raises(ValueError, match=said):
            take_rows(DataSettings(source=f"my_lab.data:{name}"))
    with limited_to(["my_lab"]), pytest.raises(ValueError, match="genericpath:exists"):
        take_rows(DataSettings(source="my_lab.data:exists"))
    with limited_to([]), pytest.raises(ValueError, match=r"--allow my_lab.data"):
        take_rows(DataSettings(source="my_lab.data:rows"))


MARKS = """
from dataclasses import dataclass
from fedloom.objectives.sft import SFT

@dataclass(frozen=True)
class Weighted(SFT):
    '''Every token, the loss times a factor.'''
    factor: float = 1.0

    def losses(self, forward, batch):
        return self.factor * SFT.losses(self, forward, batch)

def short(answer, references):
    return float(len(answer) < 3)

limit = 3
"""


def test_an_objective_and_a_score_by_their_import_paths_are_written_back_and_run(
    lab: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    (lab / "marks.py").write_text(MARKS)
    measured = ["exact_match", {"short": {"better": "lower", "score": "my_lab.marks:short"}}]
    tree = small_tree(
        tiny_folder,
        objective={"my_lab.marks:Weighted": {"factor": 2.0}},
        evaluation={"metrics": measured},
        run={"rounds": 1, "samples": 0},
    )
    recipe = build_recipe(tree)
    assert to_tree(recipe)["objective"] == {"my_lab.marks:Weighted": {"factor": 2.0}}
    assert to_tree(recipe)["evaluation"]["metrics"] == measured
    assert build_recipe(to_tree(recipe)) == recipe
    doubled = fedloom.run(recipe, tmp_path / "run")
    assert "test/short" in doubled.summary["final"]
    plain = fedloom.run(build_recipe({**tree, "objective": "sft"}), tmp_path / "plain")
    loss, twice = (r.metrics[1]["train/loss"] for r in (plain, doubled))
    assert twice > 1.5 * loss


def test_a_score_by_its_import_path_stays_in_a_recipe_file_and_in_a_run_that_is_taken_up(
    lab: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lab / "marks.py").write_text(MARKS)
    tree = small_tree(
        tiny_folder,
        evaluation={"metrics": [{"short": {"better": "lower", "score": "my_lab.marks:short"}}]},
        run={"rounds": 2, "samples": 0},
    )
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree))
    whole = fedloom.run(file, tmp_path / "whole")
    assert "test/short" in whole.metrics[0]
    fedloom.run(file, tmp_path / "part", callbacks=[lambda finished: finished.stop()])
    monkeypatch.setattr(sys, "argv", ["fedloom", "resume", str(tmp_path / "part")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    part = fedloom.open_run(tmp_path / "part")
    assert part.summary["state_sha256"] == whole.summary["state_sha256"]
    assert part.summary["final"] == whole.summary["final"]
    assert "short" in part.evaluate().metrics


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"objective": "my_lab.marks:Nothing"}, r"objective: .*my_lab.marks has no Nothing"),
        ({"objective": "my_lab.methods:MyMethod"}, r"objective: my_lab.methods:MyMethod has no "),
        (
            {"evaluation": {"metrics": [{"m": {"score": "my_lab.marks:limit"}}]}},
            r"evaluation\.metrics\.m\.score: my_lab.marks:limit is no function",
        ),
        (
            {"evaluation": {"metrics": [{"m": {"score": "mine:f"}}]}},
            r"evaluation\.metrics\.m\.score: .*mine",
        ),
        (
            {"evaluation": {"metrics": [{"m": {"score": "a:f.<locals>.g"}}]}},
            r"evaluation\.metrics\.m is scored by the function a:f.<locals>.g, which nobody can import",
        ),
        (
            {"evaluation": {"metrics": [{"m": {"score": "short"}}]}},
            r"evaluation\.metrics\.m\.score must be the import path of a function",
        ),
    ],
)
def test_what_is_no_objective_or_score_is_one_sentence(
    lab: Path, section: dict[str, Any], message: str
) -> None:
    (lab / "marks.py").write_text(MARKS)
    with pytest.raises(RecipeError, match=message):
        build_recipe({"name": "r", **section})


def test_a_site_imports_an_objective_or_a_score_only_where_it_allowed_it(lab: Path) -> None:
    (lab / "marks.py").write_text(
        MARKS + "import pathlib\npathlib.Path(__file__ + '.ran').touch()\n"
    )
    for section in (
        {"objective": "my_lab.marks:Weighted"},
        {"evaluation": {"metrics": [{"m": {"score": "my_lab.marks:short"}}]}},
    ):
        with limited_to([]), pytest.raises(RecipeError, match=r"my_lab\.marks"):
            build_recipe({"name": "r", **section})
        assert not (lab / "marks.py.ran").exists()
        with limited_to(["my_lab"]):
            build_recipe({"name": "r", **section})
        (lab / "marks.py.ran").unlink(missing_ok=True)
        del sys.modules["my_lab.marks"]
