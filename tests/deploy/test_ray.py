"""A federation on Ray's actors."""

import os
from typing import Any

import pytest

import fedloom

pytestmark = [pytest.mark.slow, pytest.mark.alone]


def test_two_actors_end_with_the_bytes_of_one_process(small_recipe, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    # Actors find the package where this process does.
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    sections: dict[str, Any] = {
        "algorithm": "scaffold",
        "local": {"batched": "off", "kernels": "torch"},
        "evaluation": {"every": 0, "generate": False, "max_examples": 2},
        "run": {"rounds": 2, "samples": 0},
    }
    here = fedloom.run(small_recipe(**sections), tmp_path / "here")
    on_ray = small_recipe(**sections, engine={"ray": {"actors": 2}})
    there = fedloom.run(on_ray, tmp_path / "there")
    assert there.summary["state_sha256"] == here.summary["state_sha256"]
