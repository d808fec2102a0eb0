"""Objects of other packages, found by import path (`my_lab.methods:MyMethod`) or by entry point, and what they must be.

A process that serves somebody else, as a site does, imports nothing that its own operator did not allow by name: all that
is imported here, is imported under `limited_to`.
"""

import dataclasses
import importlib
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import entry_points
from operator import attrgetter
from types import FunctionType
from typing import Any

_allowed: ContextVar[Sequence[str] | None] = ContextVar("allowed", default=None)


def is_path(name: str) -> bool:
    """Return whether a name in a recipe is an import path."""
    return ":" in name


def path_of(kind: type) -> str:
    """Return the import path of a class."""
    return f"{kind.__module__}:{kind.__qualname__}"


@contextmanager
def limited_to(names: Sequence[str] | None) -> Iterator[None]:
    """Refuse imports but of these modules, what lies below them, and classes (`module:Class`); None allows all.

    A thread that is started inside is not limited: let it import nothing.
    """
    token = _allowed.set(names)
    try:
        yield
    finally:
        _allowed.reset(token)


def plugged(name: str, protocol: type, *, group: str, own: Collection[str]) -> type | None:
    """Return the class of a name that is none of fedloom's: of an import path, or of an entry point.

    Args:
        name: As a recipe has it.
        protocol: What it is for, such as `Algorithm`.
        group: Of entry points, such as `fedloom.algorithms`.
        own: Names that are fedloom's, and nobody else's.

    Returns:
        The class; None where no package gives that name.

    Raises:
        ValueError: in one sentence, where the class cannot be had; see `load` and `find`.
    """
    path = name if is_path(name) else find(name, group, own)
    return None if path is None else load(path, protocol)


def load(path: str, protocol: type) -> type:
    """Return the class at an import path, which must be a frozen dataclass with the members of a protocol.

    Args:
        path: `module:Class`.
        protocol: What it is for, such as `Algorithm`.

    Raises:
        ValueError: in one sentence: not allowed here, no such module or class, no frozen dataclass, or what it lacks.
    """
    kind = _imported(path)
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        raise ValueError(
            f"{path} is no dataclass: an {protocol.__name__} is one, its fields are its settings"
        )
    if not is_frozen(kind):
        raise ValueError(f"{path} is not frozen: write @dataclass(frozen=True) above it")
    if missing := missing_members(kind, protocol):
        raise ValueError(
            f"{path} has no {' and no '.join(missing)}: see {protocol.__module__}.{protocol.__name__}"
        )
    try:
        typing.get_type_hints(kind)
    except NameError as error:
        raise ValueError(
            f"{path}: the type of a field cannot be read ({error}): import it outside of TYPE_CHECKING"
        ) from error
    # What a module imported from elsewhere is that other module's.
    _check_allowed(path_of(kind))
    return kind


def plugged_function(name: str, *, group: str) -> Callable[..., Any] | None:
    """Return the function of an import path or of an entry point; None where no package gives that name.

    Raises:
        ValueError: in one sentence, where it cannot be had.
    """
    path = name if is_path(name) else find(name, group, ())
    if path is None:
        return None
    found = _imported(path)
    if not isinstance(found, FunctionType):
        raise ValueError(f"{path} is no function")
    # What a module imported from elsewhere is that other module's.
    _check_allowed(f"{found.__module__}:{found.__qualname__}")
    return found


def find(name: str, group: str, own: Collection[str]) -> str | None:
    """Return the import path that an installed package gives a name, by an entry point; None where none does.

    Args:
        name: As in a recipe.
        group: Of entry points, such as `fedloom.algorithms`.
        own: Names that are fedloom's, and nobody else's.

    Raises:
        ValueError: where a package gives one of our own names, or two give the same.
    """
    paths = [path for known, path in _entry_points(group) if known == name]
    if paths and name in own:
        raise ValueError(
            f"{name} is fedloom's own, but an installed package gives it too ({paths[0]}, entry point of {group}):"
            f" uninstall that, or write {paths[0]}"
        )
    if len(paths) > 1:
        raise ValueError(f"{name} is given by two packages: write {' or '.join(paths)}")
    return paths[0] if paths else None


@cache
def _entry_points(group: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({(point.name, point.value) for point in entry_points(group=group)}))


def missing_members(kind: type, protocol: type) -> list[str]:
    """Return the public members of a protocol that a class does not have."""
    wanted = [name for name in vars(protocol) if not name.startswith("_")]
    return [name for name in wanted if name not in dir(kind)]


def is_frozen(kind: type) -> bool:
    """Return whether a class is a frozen dataclass."""
    return dataclasses.is_dataclass(kind) and bool(attrgetter("__dataclass_params__.frozen")(kind))


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    parts = [*module.split("."), *name.split(".")]
    if module == "__main__" or "<locals>" in name:
        raise ValueError(
            f"{path} exists only in the program that defines it: go on from there, or move it into a module"
        )
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"an import path looks like my_lab.methods:MyMethod, got {path!r}")
    _check_allowed(path)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if module != missing and not module.startswith(f"{missing}."):
            raise ValueError(f"{path}: {module} needs {missing}, which is not installed") from error
        raise ValueError(
            f"{path}: there is no module {missing}: install its package, or put its folder on PYTHONPATH"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{path}: importing {module} raised {type(error).__name__}: {error}"
        ) from error
    try:
        return attrgetter(name)(found)
    except AttributeError as error:
        raise ValueError(f"{path}: the module {module} has no {name}") from error


def _check_allowed(path: str) -> None:
    names = _allowed.get()
    if names is None:
        return
    module = path.partition(":")[0]
    if not any(name in (path, module) or module.startswith(f"{name}.") for name in names):
        raise ValueError(
            f"the recipe asks for {path}, which is no part of fedloom, and this site allows"
            f" {', '.join(names) or 'none such'}: `fedloom join --allow {module}` here, where that code is trusted"
        )
