"""YAML <-> Recipe: every key is a field of a frozen dataclass, and errors name the path in the file."""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedloom.algorithms import ALGORITHMS
from fedloom.core.description import settings_of
from fedloom.core.protocols import Algorithm
from fedloom.data.catalogue import completed
from fedloom.data.data_settings import unaccompanied
from fedloom.plugins import is_path, plugged, plugged_function
from fedloom.recipe_moved import moved_key, moved_override
from fedloom.recipe_tables import BARE, GROUPS, LISTS, TABLES
from fedloom.recipe_yaml import YamlError, brief, read_yaml, suggest
from fedloom.rounds.recipe_settings import Recipe

SHIPPED = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the path in the file."""


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path or shipped name and apply `a.b=c` overrides.

    Raises:
        RecipeError: for an unknown recipe or key, a value of the wrong type or one a section refuses.
    """
    return build_recipe(apply_overrides(read_tree(name), overrides))


def read_tree(name: str | Path) -> dict[str, Any]:
    """Return the YAML of a path or shipped name as nested mappings."""
    file = Path(name)
    if file.suffix not in {".yaml", ".yml"}:
        file = SHIPPED / f"{name}.yaml"
        if not file.exists():
            near = suggest(str(name), shipped())
            raise RecipeError(
                f"no shipped recipe is called {name!r}{near}; give one of {', '.join(shipped())}, or a path that ends in .yaml"
            )
    return read_settings(file, "recipe", key="data")


def read_settings(file: Path, what: str, *, key: str) -> dict[str, Any]:
    """Return the YAML of a file as nested mappings, under its own name if it gives none.

    Args:
        file: Of a recipe, or of what is made of recipes.
        what: Which of them it is.
        key: One that such a file has.

    Raises:
        RecipeError: where there is no file, or none of mappings.
    """
    if not file.is_file():
        raise RecipeError(f"the {what} file {file} does not exist, or is a folder")
    try:
        tree = read_yaml(file.read_bytes())
    except YamlError as error:
        raise RecipeError(f"{file} is not YAML of a {what}: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{file} must hold sections such as `{key}:`, got {type(tree).__name__}")
    return {"name": file.stem, **tree}


def shipped() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the tree with `a.b=c` applied; inside `algorithm`, the second part names the layer."""
    before = tree.get("data")
    tree = {**tree, "algorithm": _layers(tree.get("algorithm", "fedavg"))}
    for override in overrides:
        path, text = split_override(override)
        if moved := moved_override(path, text, tree):
            raise RecipeError(moved)
        keys = _keys(path, tree["algorithm"])
        value = override_value(path, text, keys)
        if keys == ["algorithm"]:
            tree["algorithm"] = _layers(value)
        elif keys[0] == "algorithm":
            tree["algorithm"] = [
                _override_layer(layer, keys[1:], value, path) for layer in tree["algorithm"]
            ]
            known = [name for layer in tree["algorithm"] for name in layer]
            if keys[1] not in known:
                message = f"{path}: the recipe's algorithm has no layer {keys[1]!r}, only {', '.join(known)}"
                raise RecipeError(message)
        else:
            tree = _put(tree, keys, value, path)
    if isinstance(before, dict) and isinstance(tree["data"], dict):
        paths = [override.partition("=")[0] for override in overrides]
        tree["data"] = unaccompanied(tree["data"], before, paths)
    return tree


def split_override(override: str) -> tuple[str, str]:
    """Return the path and the text of `section.key=value`."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"an override must look like section.key=value, got {override!r}")
    return path, text


def override_value(path: str, text: str, keys: Sequence[str]) -> Any:
    """Return the value of an override, YAML; `keys` are those down to it."""
    try:
        return read_yaml(text, keys)
    except YamlError as error:
        raise RecipeError(
            f"the value of {path} is not YAML of a recipe: {brief(text)} ({error})"
        ) from error


def _keys(path: str, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of an override's path; an import path that names a layer is one, whatever dots are in it."""
    section, _, rest = path.partition(".")
    names = [name for layer in layers for name in layer if is_path(str(name))]
    for name in names if section == "algorithm" else ():
        if rest == name or rest.startswith(f"{name}."):
            return [section, name, *rest.removeprefix(name).split(".")[1:]]
    return path.split(".")


def _layers(value: Any) -> list[dict[str, Any]]:
    """Return `algorithm:` as a list of {name: fields}, outermost first."""
    parts = value if isinstance(value, list) and value else [value]
    layers = [{part: {}} if isinstance(part, str) else part for part in parts]
    for layer in layers:
        if not isinstance(layer, dict) or len(layer) != 1:
            raise RecipeError(
                f"algorithm: each layer must be a name or one {{name: settings}}, got {brief(layer)}"
            )
    return [{name: fields or {} for name, fields in layer.items()} for layer in layers]


def _override_layer(
    layer: dict[str, Any], keys: list[str], value: Any, path: str
) -> dict[str, Any]:
    name = next(iter(layer))
    return {name: _put(layer[name], keys[1:], value, path)} if name == keys[0] else layer


def _put(tree: Any, keys: list[str], value: Any, path: str) -> Any:
    """Return the tree with `value` at `keys`; a bare name such as `cohort: uniform` opens into a mapping."""
    if not keys:
        return value
    if isinstance(tree, str):
        tree = {tree: {}}
    if tree is not None and not isinstance(tree, dict):
        raise RecipeError(f"{path}: {keys[0]!r} is inside {brief(tree)}, which has no keys")
    tree = tree or {}
    return {**tree, keys[0]: _put(tree.get(keys[0]), keys[1:], value, path)}


def build_recipe(tree: Mapping[str, Any], *, algorithm: Algorithm[Any] | None = None) -> Recipe:
    """Return the recipe of a tree of mappings; an `algorithm` that is given takes the place of the tree's."""
    if moved := moved_key(tree):
        raise RecipeError(moved)
    if algorithm is None:
        algorithm = _algorithms(_layers(tree.get("algorithm", "fedavg")))
    rest = {key: value for key, value in completed(tree).items() if key != "algorithm"}
    recipe: Recipe = dataclass_of(Recipe, rest, "", algorithm=algorithm)
    return recipe


def _algorithms(layers: Sequence[Mapping[str, Any]]) -> Any:
    names = [str(name) for layer in layers for name in layer]
    if twice := [name for name in names if names.count(name) > 1 and name in ALGORITHMS]:
        raise RecipeError(
            f"algorithm: {twice[0]} cannot be in itself, got [{', '.join(names)}]: write it once"
        )
    algorithm: Any = None
    for layer in reversed(layers):
        ((name, fields),) = layer.items()
        algorithm = _algorithm(name, fields, algorithm)
    return algorithm


def _algorithm(name: str, fields: Any, inner: Algorithm[Any] | None) -> Any:
    cls: Any = _algorithm_class(name)
    wraps = "inner" in _hints(cls)
    if wraps and inner is None:
        raise RecipeError(
            f"algorithm: {name} wraps another algorithm; write it below, as in [{name}, fedavg]"
        )
    if not wraps and inner is not None:
        raise RecipeError(f"algorithm: {name} wraps nothing, so it must be the last in the list")
    return dataclass_of(cls, fields, f"algorithm.{name}", **({"inner": inner} if wraps else {}))


def _algorithm_class(name: Any) -> Any:
    """Return the class of a layer: one of ours, or another package's."""
    try:
        found = plugged(str(name), Algorithm, group="fedloom.algorithms", own=ALGORITHMS)
    except ValueError as error:
        raise RecipeError(f"algorithm: {error}") from error
    return found or _named(ALGORITHMS, name, "algorithm")


def dataclass_of(cls: Any, fields: Any, path: str, **given: Any) -> Any:
    """Return a frozen dataclass of settings from mappings as YAML has them; `path` is where they stand in the file."""
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{path or 'a recipe'} must hold settings by name, got {brief(fields)}")
    hints = {name: hint for name, hint in _hints(cls).items() if name not in given}
    for key in fields:
        if key not in hints:
            where = f"in `{path}`" if path else "at the top"
            raise RecipeError(
                f"unknown key {key!r} {where}{suggest(str(key), hints)}; known: {', '.join(hints) or 'none'}"
            )
    missing = _required(cls) - fields.keys() - given.keys()
    if missing:
        raise RecipeError(f"{path or 'the top of the file'} needs {' and '.join(sorted(missing))}")
    values = {k: _value(hints[k], v, f"{path}.{k}" if path else str(k)) for k, v in fields.items()}
    try:
        return cls(**values, **given)
    except (ValueError, TypeError) as error:
        # What may occur in several places cannot know its own.
        where = f"{path}: " if cls in BARE else ""
        usual = f"tune.{path.rpartition('.')[2]}."
        said = str(error).replace(usual, f"{path}.") if path.startswith("tune.") else str(error)
        raise RecipeError(f"{where}{said}") from error


def _value(hint: Any, value: Any, path: str) -> Any:
    if hint in TABLES:
        if isinstance(value, str):
            value = {value: {}}
        if not isinstance(value, Mapping) or len(value) != 1:
            several = isinstance(value, Mapping) and value and value.keys() <= TABLES[hint].keys()
            # An override of one kind's setting where the recipe has another.
            last = (
                f"; the override {path}={[*value][-1]} first replaces what is there"
                if several
                else ""
            )
            raise RecipeError(
                f"{path} must be one of {', '.join(TABLES[hint])}, or one {{name: settings}}, got {brief(value)}{last}"
            )
        ((name, fields),) = value.items()
        return dataclass_of(_choice(hint, name, path), fields or {}, f"{path}.{name}")
    if hint in LISTS:
        return _listed(LISTS[hint], value, path)
    if hint in BARE and isinstance(value, int | float | str):
        value = {BARE[hint]: value}
    if dataclasses.is_dataclass(hint):
        return dataclass_of(hint, {} if value is None else value, path)
    settings = [part for part in typing.get_args(hint) if dataclasses.is_dataclass(part)]
    if value is not None and len(settings) == 1 and type(None) in typing.get_args(hint):
        return dataclass_of(settings[0], value, path)
    if settings and typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{path} must be a list of settings, got {brief(value)}")
        return tuple(dataclass_of(settings[0], v, f"{path}.{i}") for i, v in enumerate(value))
    if isinstance(value, bool) and (word := "on" if value else "off") in typing.get_args(hint):
        value = word  # as YAML reads it without quotes
    if _is_bool_for_number(hint, value):
        raise RecipeError(f"{path} must be a number, got {value!r}")
    try:
        checked = _adapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        unquoted = first["type"] == "string_type" and isinstance(first["input"], bool)
        hint = (
            "; YAML reads yes, no, on and off without quotes as true and false" if unquoted else ""
        )
        raise RecipeError(
            f"{path}: {first['msg'][0].lower()}{first['msg'][1:]}, got {brief(value)}{hint}"
        ) from error
    return tuple(checked) if isinstance(checked, list) else checked


def _choice(hint: Any, name: Any, path: str) -> Any:
    """Return the class of a name in a table, or of another package's where those may join in."""
    if hint in GROUPS and name not in TABLES[hint]:
        try:
            found = plugged(str(name), hint, group=GROUPS[hint], own=TABLES[hint])
        except ValueError as error:
            raise RecipeError(f"{path}: {error}") from error
        if found is not None:
            return found
    return _named(TABLES[hint], name, path)


def _listed(cls: Any, value: Any, path: str) -> tuple[Any, ...]:
    """Return names as they are, and a dataclass of each {name: settings}."""
    if not isinstance(value, list | tuple):
        raise RecipeError(
            f"{path} must be a list of names and {{name: settings}}, got {brief(value)}"
        )
    found = list[Any]()
    for item in value:
        if isinstance(item, str | cls):
            found.append(item)
            continue
        if not isinstance(item, Mapping) or len(item) != 1:
            raise RecipeError(f"{path} must hold names and {{name: settings}}, got {brief(item)}")
        ((name, fields),) = item.items()
        if isinstance(fields, Mapping) and "score" in fields:
            fields = {**fields, "score": _score_of(fields["score"], f"{path}.{name}")}
        found.append(dataclass_of(cls, fields or {}, f"{path}.{name}", name=name))
    return tuple(found)


def _score_of(name: Any, path: str) -> Callable[..., Any]:
    """Return the function that a metric is scored by, as it is imported or as an installed package gives it."""
    if not isinstance(name, str) or name.startswith("__main__:") or "<" in name:
        raise RecipeError(
            f"{path} is scored by the function {name}, which nobody can import: give the metric as an object, from"
            " Python"
        )
    try:
        found = plugged_function(name, group="fedloom.metrics")
    except ValueError as error:
        raise RecipeError(f"{path}.score: {error}") from error
    if found is None:
        raise RecipeError(
            f"{path}.score must be the import path of a function (module:function), or a name that an installed"
            f" package gives in fedloom.metrics, got {brief(name)}"
        )
    return found


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))


def _is_bool_for_number(hint: Any, value: Any) -> bool:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    parts = typing.get_args(hint) if is_union else (hint,)
    return isinstance(value, bool) and bool not in parts and any(p in (int, float) for p in parts)


def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in settings_of(cls) if f.init}


def _required(cls: Any) -> set[str]:
    nothing = dataclasses.MISSING
    return {
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.default is nothing and f.default_factory is nothing
    }


def _named(table: Mapping[str, Any], name: Any, path: str) -> Any:
    if name not in table:
        raise RecipeError(
            f"{path}: unknown name {name!r}{suggest(str(name), table)}; known: {', '.join(table)}"
        )
    return table[name]
