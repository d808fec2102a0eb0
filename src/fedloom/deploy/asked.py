"""What a recipe asks of a site's data, in one line for the site's log."""

import json

import yaml

from fedloom.engines.introductions import plain
from fedloom.recipe import build_recipe
from fedloom.recipe_text import to_tree


def asked_of(recipe_text: str) -> str:
    """Return what a recipe asks of a site's rows, in one line: its section data, less the defaults, and its objective."""
    tree = yaml.safe_load(recipe_text)
    default = to_tree(build_recipe({"name": "default", "algorithm": "fedavg"}))
    tree = tree if isinstance(tree, dict) else {}
    odd = {k: v for k, v in (tree.get("data") or {}).items() if v != default["data"].get(k)}
    asked = f"data: {json.dumps(odd, ensure_ascii=False, default=str)}"
    objective = tree.get("objective", default["objective"])
    if objective != default["objective"]:
        asked += f", objective: {json.dumps(objective, ensure_ascii=False, default=str)}"
    return plain(asked)
