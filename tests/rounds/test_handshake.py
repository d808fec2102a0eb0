"""A run in seed space goes on, or is read, only where its coefficients still mean the same weights."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fedloom import experiment
from fedloom.rounds.checkpoint import Checkpoints
from fedloom.rounds.loop import Run
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import build

Make = Callable[..., Recipe]
SEEDS: dict[str, Any] = {
    "algorithm": {"fedkseed": {"steps": 4}},
    "tune": {"seeds": {"num_seeds": 32}},
    "local": {"lr": 1e-4, "steps": None, "batch_size": 2},
    "evaluation": {"every": 0, "generate": False, "max_examples": 2},
}


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """Return the folder of a model that a test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def recipe_of(small_recipe: Make, model: Path) -> Make:
    """Return a maker: `recipe_of(rounds, distribution="rademacher")`."""

    def make(rounds: int, distribution: str = "rademacher") -> Recipe:
        run = {"rounds": rounds, "samples": 0}
        tune = {"seeds": {"num_seeds": 32, "distribution": distribution}}
        recipe = small_recipe(**{**SEEDS, "run": run, "tune": tune})
        return replace(recipe, model=replace(recipe.model, name=str(model)))

    return make


def other_weights(model: Path, _monkeypatch: pytest.MonkeyPatch) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


def other_stream(_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.spaces.seed_space.NOISE_VERSION", 2)


def other_names(_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.spaces.live.clean", lambda name: f"renamed.{name}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            other_weights,
            r"weights of the base model \(model\.name, file, revision, dtype, quantize\)",
        ),
        (other_stream, r"version of the random stream \(versions of fedloom\)"),
        (
            other_names,
            r"names and order of the tensors that move \(tune, versions of the model's code\)",
        ),
    ],
)
def test_a_run_does_not_go_on_where_its_coefficients_mean_another_model(
    change: Any,
    said: str,
    recipe_of: Make,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At resume: what the recipe cannot tell, since a name stays and a file changes."""
    folder = tmp_path / "run"
    experiment.run(recipe_of(1), folder)
    before = {p: p.read_bytes() for p in (folder / "metrics.jsonl", *folder.glob("checkpoints/*"))}
    change(model, monkeypatch)
    until = r"has changed: (.*; )?"
    remedy = r", \w+ then and \w+ now.*: put it back, or begin a new run; what was learnt counts"
    with pytest.raises(ValueError, match=rf"{until}{said}{remedy}"):
        experiment.run(recipe_of(2), folder)
    assert before == {path: path.read_bytes() for path in before}, "nothing has happened yet"


def test_another_distribution_is_refused_by_the_recipe_and_where_that_is_not_asked_by_the_space(
    recipe_of: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    experiment.run(recipe_of(1), folder)
    with pytest.raises(
        ValueError, match=r'tune\.seeds\.distribution was "rademacher" and is "gaussian"'
    ):
        experiment.run(recipe_of(2, "gaussian"), folder)
    other = build(recipe_of(1, "gaussian"), folder)
    with pytest.raises(
        ValueError, match=r"distribution of the directions .*: here gaussian, there radem"
    ):
        last_run(other)
    assert last_run(build(recipe_of(1), folder)).number == 1


def test_where_all_is_the_same_a_run_goes_on_as_if_never_stopped(
    recipe_of: Make, tmp_path: Path
) -> None:
    experiment.run(recipe_of(1), tmp_path / "run")
    resumed = experiment.run(recipe_of(3), tmp_path / "run").summary
    whole = experiment.run(recipe_of(3), tmp_path / "whole").summary
    assert resumed["state_sha256"] == whole["state_sha256"]


def test_weights_need_no_handshake(small_recipe: Make, tmp_path: Path) -> None:
    """Checkpoints of other spaces hold none, and one of seeds is not taken for theirs."""
    experiment.run(small_recipe(run={"rounds": 1, "samples": 0}), tmp_path)
    session = build(small_recipe(), tmp_path)
    assert last_run(session).number == 1
    seeds = Checkpoints(tmp_path / "seeds", space={"base": "0123", "distribution": "gaussian"})
    fresh = Run(1, 5, None)
    seeds.save(fresh)
    assert seeds.load(fresh).run == fresh
    with pytest.raises(ValueError, match=r"same weights of the base model .*: here none, there 01"):
        Checkpoints(tmp_path / "seeds").load(fresh)
