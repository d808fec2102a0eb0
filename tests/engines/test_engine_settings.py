"""The recipe's section `engine`."""

from typing import Any

import pytest

from fedloom.engines.engine_settings import FlowerSettings, RaySettings
from fedloom.recipe import apply_overrides, build_recipe
from fedloom.recipe_text import to_tree


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (FlowerSettings, {"nodes": -1}, "engine.flower.nodes must be at least 0, got -1"),
        (FlowerSettings, {"deadline": 0}, r"engine.flower.deadline must be in \[1, 1e6\], got 0"),
        (FlowerSettings, {"patience": float("nan")}, "engine.flower.patience must be in"),
        (RaySettings, {"actors": 0}, "engine.ray.actors must be at least 1, got 0"),
        (RaySettings, {"gpus": -1}, "engine.ray.gpus must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_meant_is_refused(kind: Any, settings: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        kind(**settings)


def test_an_engine_is_a_name_or_a_name_with_settings():
    tree = {"name": "x", "algorithm": "fedavg"}
    assert build_recipe(apply_overrides(tree, ["engine=flower"])).engine == FlowerSettings()
    deadline = ["engine=flower", "engine.flower.deadline=60"]
    made = build_recipe(apply_overrides(tree, deadline))
    assert made.engine == FlowerSettings(deadline=60)
    assert to_tree(build_recipe(tree))["engine"] == {"inprocess": {}}
    assert build_recipe(to_tree(made)).engine == made.engine


def test_data_is_elsewhere_only_where_sites_join():
    tree = {"name": "x", "algorithm": "fedavg"}
    assert build_recipe({**tree, "engine": {"flower": {"nodes": 0}}}).elsewhere
    assert not build_recipe({**tree, "engine": "flower"}).elsewhere
    assert not build_recipe(tree).elsewhere
