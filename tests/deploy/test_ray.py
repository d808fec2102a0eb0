"""Actors of Ray end with the same bytes as clients in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.launch import run_recipe
from fedloom.run.settings import Recipe

pytest.importorskip("ray", reason="the extra `ray` is not installed")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_actors_end_with_the_same_bytes(recipe: Callable[..., Recipe], tmp_path: Path):
    here = run_recipe(recipe(), tmp_path / "here")[""]
    there = run_recipe(recipe(engine={"ray": {"actors": 2}}), tmp_path / "there")[""]
    assert there["state_sha256"] == here["state_sha256"]
    assert there["num_absent"] == 0
