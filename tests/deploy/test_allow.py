"""A site imports what its operator allowed by name, whatever a server says."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedloom.cli import app
from fedloom.deploy.greeting import greeting, shared_recipe
from fedloom.deploy.limits import Limits
from fedloom.deploy.site import Site
from fedloom.deploy.site_settings import SiteSettings
from fedloom.recipe_text import to_yaml
from fedloom.rounds.loop import begin, draw, tasks
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import build
from fedloom.wire.format import decode_reply, encode_task

REMOTE = {"flower": {"nodes": 0}}
METHOD = "my_lab.methods:MyMethod"
Make = Callable[..., Recipe]


def site(recipe: Recipe, folder: Path, **limits: Any) -> Site:
    data = Path(recipe.data.source) / "alba.jsonl"
    return Site(SiteSettings("alba", folder / "site", data, limits=Limits(**limits)))


def asking_for(algorithm: str, recipe: Recipe, folder: Path) -> Mapping[str, Any]:
    """Return the greeting of a server whose recipe names an algorithm that is not imported here."""
    head = dict(greeting(shared_recipe(recipe), build(recipe, folder / "server")))
    text = head["recipe"].replace("- fedavg:", f"- {algorithm}:")
    assert text != head["recipe"]
    return {**head, "recipe": text, "kind": "hello"}


@pytest.mark.parametrize("allow", [[], ["my_lab.method"], ["your_lab"]], ids=str)
def test_what_is_not_allowed_is_refused_before_it_is_imported(
    allow: list[str], recipe: Make, lab: Path, tmp_path: Path
):
    asked = recipe(engine=REMOTE)
    head = asking_for(METHOD, asked, tmp_path)
    said, _ = site(asked, tmp_path, allow=allow).answer(dict(head), [])
    assert "--allow my_lab.methods` here, where that code is trusted" in said["refusal"]
    assert "my_lab" not in sys.modules
    assert not (lab / "methods.ran").exists()


@pytest.mark.parametrize("path", ["os:system", "subprocess:Popen", "my_lab.methods:function"])
def test_nothing_else_of_this_machine_can_be_named_either(
    path: str, recipe: Make, lab: Path, tmp_path: Path
):
    asked = recipe(engine=REMOTE)
    said, _ = site(asked, tmp_path).answer(dict(asking_for(path, asked, tmp_path)), [])
    assert f"the recipe asks for {path}, which is no part of fedloom" in said["refusal"]


def test_what_is_allowed_joins_and_trains(recipe: Make, lab: Path, tmp_path: Path):
    asked = recipe(engine=REMOTE, algorithm={METHOD: {"strength": 0.5}})
    server = build(asked, tmp_path / "server")
    head = dict(greeting(shared_recipe(asked), server))
    run = begin(asked.algorithm, server.space.start(), 0)
    round = draw(run, {"alba": {"num_examples": "9"}}, None)
    (task,) = tasks("train", round, asked.algorithm.broadcast(run.state, round))
    message = encode_task(task, settings=asked.wire)
    own = site(asked, tmp_path, allow=["my_lab"])
    said, _ = own.answer({**head, "kind": "hello"}, [])
    assert said.get("identity") == head["identity"], said
    said, (back,) = own.answer({**head, "kind": "work", "tasks": [[0, 1]]}, [message, b""])
    assert said["answers"] == [None]
    assert decode_reply(back).upload["delta"].keys() == server.space.start().keys()


def test_the_limits_on_algorithms_hold_as_well(recipe: Make, lab: Path, tmp_path: Path):
    asked = recipe(engine=REMOTE)
    head = asking_for(METHOD, asked, tmp_path)
    own = site(asked, tmp_path, allow=["my_lab"], algorithms=["fedavg"])
    assert "this site allows --algorithms fedavg" in own.answer(dict(head), [])[0]["refusal"]


def test_a_node_on_the_servers_machine_runs_what_the_runs_own_recipe_names(
    recipe: Make, lab: Path, tmp_path: Path
):
    asked = recipe(algorithm=METHOD)
    head = dict(greeting(shared_recipe(asked), build(asked, tmp_path / "server")))
    node = Site(SiteSettings("node-0", tmp_path / "node", clients=["alba"]))
    said, _ = node.answer({**head, "kind": "hello"}, [])
    assert list(said["clients"]) == ["alba"], said


@pytest.mark.parametrize(("allow", "code"), [((), 1), (("--allow", "my_lab.methods"), 0)])
def test_a_dry_run_imports_from_the_sites_own_copy_what_is_allowed(
    allow: tuple[str, ...], code: int, recipe: Make, lab: Path, tmp_path: Path
):
    file = tmp_path / "recipe.yaml"
    asked = recipe(engine=REMOTE)
    file.write_text(to_yaml(asked).replace("- fedavg:", f"- {METHOD}:"))
    data = str(Path(asked.data.source) / "alba.jsonl")
    options = ["--name", "alba", "--data", data, "--keys", str(tmp_path), "--recipe", str(file)]
    done = CliRunner().invoke(app, ["join", "a:1", *options, "--dry-run", *allow])
    assert (done.exit_code or 0) == code
    assert (lab / "methods.ran").exists() == (not code)
    if code:
        assert "this site allows none such" in str(done.exception)
    else:
        assert "lora_A" in done.output
