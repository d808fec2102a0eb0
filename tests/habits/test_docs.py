"""Every block of code on a page is run, built or read as a reader would."""

import dataclasses
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args, get_type_hints

import click
import pytest
import torch
import yaml
from tests.habits.test_pages import DOCS, ROOT, page
from typer.main import get_command

import fedloom
from fedloom.algorithms import ALGORITHMS
from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.params import sub
from fedloom.recipe import build_recipe, load_recipe, read_tree
from fedloom.recipe_tables import TABLES
from fedloom.rounds.recipe_settings import Recipe

PAGES = ["README.md", "CONTRIBUTING.md", *DOCS]
PYTHON = {
    "README.md": "tests/test_cli.py, tests/test_notebook.py and here",
    "CONTRIBUTING.md": "here",
    "docs/data_and_model.md": "here",
    "docs/start.md": "here",
}
"""Pages with blocks of Python, and where these are run."""
SMALL = ["data.num_examples=240", "local.steps=1", "run.samples=1", "evaluation.max_new_tokens=2"]
FENCE = re.compile(r"^```(\S[^\n]*)?\n(.*?)^```$", re.M | re.S)


def blocks(name: str) -> list[tuple[str, str]]:
    """Return kind and text of the fenced blocks of a page."""
    return FENCE.findall(page(name))


def of_kind(name: str, kind: str) -> list[str]:
    return [text for found, text in blocks(name) if found == kind]


def commands(name: str) -> list[list[str]]:
    """Return the words of every line of a page's shell blocks."""
    lines = [line for text in of_kind(name, "bash") for line in text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parsed(words: Sequence[str]) -> click.Context:
    """Return a fedloom command as the command line reads it, not run."""
    from fedloom.cli import app

    command, above = get_command(app), None
    name, rest = "fedloom", list(words)
    while True:
        context = command.make_context(name, rest, parent=above)
        if not isinstance(command, click.Group):
            return context
        found, inner, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert found
        assert inner
        command, name, above = inner, found, context


@dataclasses.dataclass(frozen=True)
class Trimmed(FedAvg):
    """Stands for the class that the pages name by its import path."""

    share: float = 0.0
    strength: float = 0.0


def shown(name: str) -> ModuleType:
    """Return a module of all Python of a page."""
    module = ModuleType(Path(name).stem)
    for text in of_kind(name, "python"):
        exec(text, vars(module))
    return module


@pytest.fixture
def my_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the package that the pages call my_lab where it is imported from."""
    page = shown("docs/data_and_model.md")
    modules = {
        "my_lab": {},
        "my_lab.methods": {"Trimmed": Trimmed, "MyMethod": Trimmed},
        "my_lab.objectives": {"Weighted": page.Weighted},
        "my_lab.scores": {"too_long": page.too_long},
    }
    for name, names in modules.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", PAGES)
def test_a_block_is_of_a_kind_that_is_checked_here_or_by_sphinx(name: str):
    kinds = {kind for kind, _ in blocks(name)}
    directives = {kind for kind in kinds if kind.startswith("{")}
    assert kinds - directives <= {"bash", "python", "yaml"}
    assert name in DOCS or not directives
    assert ("python" in kinds) == (name in PYTHON)


@pytest.mark.parametrize("name", [name for name in PAGES if commands(name)])
def test_a_command_is_one_that_the_command_line_takes(name: str):
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.M))
    for program, *words in commands(name):
        if program == "make":
            assert words[0] in targets
            continue
        assert program == "fedloom", f"{program} is none of our commands"
        given = parsed(words).params
        if words[0] in ("run", "plan", "data", "serve"):
            recipe = "quickstart" if given["recipe"] == "recipe.yaml" else given["recipe"]
            load_recipe(recipe, given.get("overrides") or ())


def test_a_command_that_is_none_is_found():
    with pytest.raises(click.NoSuchOption, match="--nowhere"):
        parsed(["run", "quickstart", "--nowhere"])
    with pytest.raises(click.UsageError, match="start"):
        parsed(["start", "quickstart"])


@pytest.mark.parametrize("name", [*PAGES, "SECURITY.md"])
def test_an_extra_that_is_named_is_one(name: str):
    extras = tomllib.loads(page("pyproject.toml"))["project"]["optional-dependencies"]
    named = re.findall(r"fedloom\[([\w, ]+)\]", page(name))
    assert {extra.strip() for names in named for extra in names.split(",")} <= extras.keys()


@pytest.mark.parametrize("name", [name for name in PAGES if of_kind(name, "yaml")])
@pytest.mark.usefixtures("my_lab")
def test_yaml_is_a_part_of_a_recipe(name: str):
    for text in of_kind(name, "yaml"):
        build_recipe({**read_tree("quickstart"), **yaml.safe_load(text)})


def test_the_metric_of_the_page_on_data_takes_answers():
    metric = shown("docs/data_and_model.md").metric
    assert metric.better == "lower"
    assert [metric.score(answer, ["ab"]) for answer in ("abc", "abcdef")] == [0.0, 1.0]


def test_the_answers_of_the_first_page_are_those_of_its_benchmark():
    text, measured = page("docs/start.md"), page("benchmarks/results/real_smollm2.md")
    answers = [line for line in text.splitlines() if line.startswith("|")]
    assert len(answers) == 5
    assert all(line in measured.splitlines() for line in answers)
    (loss,) = re.findall(r"test loss (\S+) to\s+(\S+), exact match 0 to (\d+) %", text)
    table = re.findall(r"(?:loss|match) +│ +(\S+)[ %]+│ +(\S+)", measured)
    assert table == [("0.0", f"{loss[2]}.0"), (loss[0], loss[1])]


@pytest.mark.slow
def test_the_python_of_the_first_page_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for text in of_kind("docs/start.md", "python"):
        exec(text.replace('"data.num_examples=600"', ", ".join(map(repr, SMALL))), names)
    assert names["result"].summary["rounds"] == 2
    assert names["again"].folder == Path("runs/from-python")
    assert (tmp_path / "runs/loop/report.html").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("my_lab")
def test_the_test_that_contributors_are_shown_passes():
    (text,) = of_kind("CONTRIBUTING.md", "python")
    names: dict[str, Any] = {}
    exec(text, names)
    names["test_my_method_keeps_the_laws"]()


def test_the_readmes_client_half_does_what_ours_does():
    *_, text = of_kind("README.md", "python")
    names: dict[str, Any] = {
        "Fit": fedloom.Fit,
        "Proximal": fedloom.Proximal,
        "Reply": fedloom.Reply,
        "sub": sub,
    }
    exec(text, names)
    start = {"w": torch.ones(2)}
    task = fedloom.Task("train", 1, "a", 0, {}, {"params": start})
    done = fedloom.Done({"w": torch.tensor([3.0, 1.0])}, 5, metrics={"loss": 1.0})
    halves = (
        names["client_update"](SimpleNamespace(mu=0.1), task, {}),
        FedAvg(mu=0.1).client_update(task, {}),
    )
    shown, ours = map(next, halves)
    assert shown == ours
    replies = []
    for half in halves:
        with pytest.raises(StopIteration) as end:
            half.send(done)
        replies.append(end.value.value)
    (shown, shown_state), (ours, ours_state) = replies
    assert shown_state == ours_state == {}
    assert torch.equal(shown.upload["delta"]["w"], ours.upload["delta"]["w"])
    assert (shown.client, shown.weight, shown.metrics) == (ours.client, ours.weight, ours.metrics)


def keys(hint: Any) -> dict[str, Any]:
    """Return what may stand below a section of a recipe, and what each stands for."""
    if hint in TABLES:
        return dict(TABLES[hint])
    inside = [hint, *get_args(hint)]
    kinds = [kind for kind in inside if dataclasses.is_dataclass(kind)]
    return {name: found for kind in kinds for name, found in get_type_hints(kind).items()}


@pytest.mark.parametrize("name", [*PAGES, "ARCHITECTURE.md", "PAPERS.md"])
def test_a_setting_that_is_named_is_one(name: str):
    sections = "model|tune|data|objective|local|cohort|evaluation|wire|engine|run"
    for path in re.findall(rf"`((?:{sections})(?:\.[a-z_]+)+)(?=[`=: ])", page(name)):
        found: Any = Recipe
        for key in path.split("."):
            assert key in keys(found), f"{path}: no {key}"
            found = keys(found)[key]
    assert "lora" in keys(get_type_hints(Recipe)["tune"])
    assert "rank" not in keys(get_type_hints(Recipe)["tune"]), "as it once was"


def test_what_the_page_on_sums_says_of_settings_is_measured():
    measured = {
        row[0]: row
        for line in page("benchmarks/results/audit.md").splitlines()
        if len(row := [cell.strip() for cell in line.split("|")[1:-1]]) == 8
    }
    lines = page("docs/secure.md").split("changes, measured")[1].split("## What is assumed")[0]
    settings = dict(re.findall(r"^\| (.+?) \| (.+) \|$", lines, re.M))
    whole, lora = "all weights", "LoRA r8"
    said = {
        "none, all weights": (whole,),
        "LoRA of rank 8": (lora,),
        "more local steps": (f"{lora}, 4 SGD steps", f"{lora}, 16 SGD steps"),
        "an upload of the largest quarter (`flasc`)": (
            f"{whole}, FLASC 1/4 up",
            f"{lora}, FLASC 1/4 up",
        ),
        "`secure`, sums of 8 clients": (f"{whole}, secure sum of 8", f"{lora}, secure sum of 8"),
        "`private`, noise 0.5 of the clip": (f"{whole}, mean of 4 clients, noise 0.5 of the clip",),
        "`tune: seeds`": ("seeds, K = 1024 (FedKSeed)",),
    }
    for setting, names in said.items():
        shares = re.findall(r"(\d+) %", settings[setting])
        assert [f"{share} %" for share in shares] == [measured[name][5] for name in names]
        for area in re.findall(r"0\.\d\d", settings[setting]):
            assert [area] == [measured[name][7].split()[0] for name in names]


def test_what_the_page_on_data_says_of_the_plan_s_memory_is_measured():
    kept = json.loads(page("benchmarks/kept/real_plan.json"))
    rows = {name: one for name, one in kept.items() if name.startswith("memory, ")}
    assert len(rows) == 12
    assert all(abs(one["plan"]["memory"] / one["run"]["memory"] - 1) < 0.1 for one in rows.values())


def test_every_public_name_is_in_the_reference():
    text = page("docs/api.md")
    listed = set(re.findall(r"^\.\. (?:auto|py:)\w+:: fedloom\.(\w+)\b(?!\.)", text, re.M))
    assert listed == set(fedloom.__all__)


def test_every_setting_is_on_the_page_of_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    from settings_page import page as settings  # type: ignore[import-not-found]

    text = settings()
    sections = [kind for table in TABLES.values() for kind in table.values()]
    sections += [
        kind
        for kind in get_type_hints(Recipe).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    ]
    assert len(sections) > 40
    for kind in sections:
        for field in dataclasses.fields(kind):
            if field.init and field.name != "inner":
                rows = re.findall(rf"^\| `{field.name}` \|.*", text, re.M)
                assert rows
                silent = [row for row in rows if re.search(r"\| \*[^*]*\* \|$", row)]
                assert not silent, "no docstring says what it is"
    for name in {*ALGORITHMS, "tune: lora", "engine: flower", "objective: classification"}:
        assert f"### {name}\n" in text
    assert "object at 0x" not in text
