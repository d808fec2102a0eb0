"""Keys that stood elsewhere in earlier recipes: where each stands now, and what to write."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import yaml

from fedloom.recipe_yaml import brief
from fedloom.spaces.tune import TUNES

_REPLACED = {
    "data.classes": "`objective: {classification: {classes: ...}}`",
    "local.objective": "a section of its own: `objective: sft`, or `objective: {classification: {classes: ...}}`",
}
"""Keys whose values stand in a section of another shape now, and what to write there."""
_TUNE = {
    "space": "",
    **dict.fromkeys(("rank", "alpha", "dropout", "rslora", "dora", "targets"), "lora"),
    **dict.fromkeys(("modules_to_save", "origin"), "lora"),
    **dict.fromkeys(("num_seeds", "law", "law_rank"), "seeds"),
    "weights": "full",
}
"""Keys that stood in `tune` itself, and the kind they belong to where the section does not say another that has them."""
_RENAMED = {"law": "distribution", "law_rank": "distribution_rank"}


def moved_key(tree: Mapping[str, Any]) -> str | None:
    """Say of the first key of a recipe that has moved what to write instead; None where none has."""
    for path, place in _REPLACED.items():
        above, _, key = path.partition(".")
        if isinstance(tree.get(above), Mapping) and key in tree[above]:
            return f"{path} is now {place}"
    tune = tree.get("tune")
    if not isinstance(tune, Mapping):
        return None
    old = [key for key in tune if key in _TUNE]
    if not old:
        return None
    if tune.get("space", "lora") not in [*TUNES]:
        return f"tune.space is now the key of the section, one of {', '.join(TUNES)}: got {brief(tune['space'])}"
    kind = _chosen(tune) if "space" in tune else _kind(tune, old[0])
    fields = {_RENAMED.get(key, key): tune[key] for key in old}
    fields = {key: value for key, value in fields.items() if key in _fields(kind)}
    own = tune[kind] if isinstance(tune.get(kind), Mapping) else {}
    section = {kind: {**fields, **own}}
    text = yaml.safe_dump(section, default_flow_style=True, sort_keys=False, width=math.inf).strip()
    first = next((key for key in old if _RENAMED.get(key, key) in fields), "space")
    return f"{_moved(first, kind)}: write tune: {text if section[kind] else kind}"


def moved_override(path: str, text: str, tree: Mapping[str, Any]) -> str | None:
    """Say of an override `path=text` what to write instead, if its key has moved; None if it has not.

    Args:
        path: The keys, joined by dots.
        text: The value as it was written.
        tree: The recipe it is an override of.
    """
    for moved, place in _REPLACED.items():
        if path == moved or path.startswith(f"{moved}."):
            return f"{moved} is now {place}"
    section, _, key = path.partition(".")
    if section != "tune" or key not in _TUNE:
        return None
    if key == "space":
        return f"tune.space is now tune: write tune={text}"
    kind = _kind(tree.get("tune"), key)
    return f"{_moved(key, kind)}: write tune.{kind}.{_RENAMED.get(key, key)}={text}"


def _moved(key: str, kind: str) -> str:
    new = "the key of the section" if key == "space" else f"tune.{kind}.{_RENAMED.get(key, key)}"
    return f"tune.{key} is now {new}"


def _kind(tune: Any, key: str) -> str:
    """Return the kind that a key of old belongs to: the section's own where that has it."""
    chosen = _chosen(tune)
    return chosen if _RENAMED.get(key, key) in _fields(chosen) else _TUNE[key]


def _chosen(tune: Any) -> str:
    """Return the kind of a section as it was written before, as it is now, or of none."""
    names = [tune] if isinstance(tune, str) else tune or {}
    space = tune.get("space") if isinstance(tune, Mapping) else None
    return next((name for name in (*names, space) if name in [*TUNES]), "lora")


def _fields(kind: str) -> set[str]:
    settings: Any = TUNES[kind]
    return {field.name for field in dataclasses.fields(settings)}
