"""What a recipe asks of a site's data, in one line for the site's log; what the server is told of an error in that data."""

import json
import re

import yaml

from fedloom.engines.introductions import plain
from fedloom.recipe import build_recipe
from fedloom.recipe_text import to_tree

_QUOTED = re.compile(r"""(got ).*|'.*'|".*\"""", re.DOTALL)
"""The parts of a sentence that may be data; from the first quotation mark to the last, as text has marks of its own."""


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


def unquoted(sentence: str) -> str:
    """Return what the server is told of an error in the data: where it is and what is wanted, not what stands there."""
    return _QUOTED.sub(
        lambda found: "got (see the site)" if found[1] else "(see the site)", sentence
    )
