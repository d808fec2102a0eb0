"""Writes settings.md before Sphinx reads: every setting of a recipe with its default, from the dataclasses themselves."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedloom.algorithms import ALGORITHMS
from fedloom.recipe_tables import TABLES
from fedloom.rounds.recipe_settings import Recipe

HEAD = """# All settings

A recipe is a YAML file. Its sections and their settings, with defaults; on the command line a setting is written by its
path, as in `fedloom run quickstart local.lr=0.01`. A setting that would have no effect is an error.
"""


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, its bases' too."""
    docs = dict[str, str]()
    for kind in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, below in itertools.pairwise(tree.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(inspect.cleandoc(str(below.value.value)).split())
    return docs


PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def type_name(hint: Any) -> str:
    """Return a type as people read it."""
    if hint in PLAIN:
        return PLAIN[hint]
    if dataclasses.is_dataclass(hint):
        return "settings of its own, below"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(str(value) for value in typing.get_args(hint))
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    arguments = [type_name(one) for one in typing.get_args(hint) if one is not ...]
    origin = typing.get_origin(hint)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    if origin is not None and origin.__name__ in ("Sequence", "tuple", "list"):
        return f"list of {arguments[0]}" if arguments else "list"
    return " or ".join(dict.fromkeys(arguments)) or str(hint)


def default_of(field: "dataclasses.Field[Any]") -> str:
    """Return a field's default as a recipe would write it."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    for table in TABLES.values():
        for name, cls in table.items():
            if type(value) is cls:
                return f"`{name}`"
    if dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, tuple):
        value = list(value)
    for plain, text in ((None, "null"), (True, "true"), (False, "false"), ("", '""')):
        if value is plain or value == plain == "":
            return f"`{text}`"
    return f"`{value}`"


def rows(cls: type) -> Iterator[str]:
    """Yield a table of a dataclass's settings."""
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    fields = [
        f
        for f in dataclasses.fields(cls)
        if f.init and f.name != "inner" and not f.metadata.get("filled")
    ]
    if not fields:
        yield "No settings.\n"
        return
    yield "| setting | default | meaning |\n|---|---|---|"
    for field in fields:
        hint = hints[field.name]
        choice = next((table for kind, table in TABLES.items() if kind == hint), None)
        kind = f"one of {', '.join(f'`{name}`' for name in choice)}" if choice else type_name(hint)
        meaning = " ".join(filter(None, (docs.get(field.name, ""), f"*{kind}*")))
        yield f"| `{field.name}` | {default_of(field)} | {meaning.replace('|', '/')} |"
    yield ""


def first_line(cls: type) -> str:
    """Return the first sentence of a class's docstring."""
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def table_of(hint: Any) -> Mapping[str, type] | None:
    """Return the choices by name that a type stands for."""
    return next((table for kind, table in TABLES.items() if kind == hint), None)


def page() -> str:
    """Return settings.md."""
    lines, shown = (
        [HEAD, "## algorithm\n", "A name, or a list of wrappers around one, outermost first.\n"],
        set[int](),
    )
    inside: list[tuple[str, Any]] = []

    def section(title: str, path: str, cls: type) -> None:
        lines.extend([f"### {title}\n", first_line(cls) + "\n", *rows(cls)])
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            hint = hints[field.name]
            if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(
                of := hint.__args__[0]
            ):
                hint = of
            nested = (isinstance(hint, type) and dataclasses.is_dataclass(hint)) or table_of(hint)
            if field.init and field.name != "inner" and nested:
                inside.append((f"{path}.{field.name}", hint))

    for name, cls in ALGORITHMS.items():
        section(name, name, cls)
    hints = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if field.name not in ("name", "description", "algorithm", "objects"):
            lines.append(f"## {field.name}\n")
            hint = hints[field.name]
            table = table_of(hint)
            # A section that may be left out is the one it is where it is there.
            known = [part for part in typing.get_args(hint) if dataclasses.is_dataclass(part)]
            if table is None and not known and not dataclasses.is_dataclass(hint):
                said = field_docs(Recipe)[field.name]
                lines.append(f"{said} *{type_name(hint)}*, {default_of(field)} by default.\n")
                continue
            for name, cls in (table or {"": known[0] if known else hint}).items():
                section(
                    f"{field.name}: {name}" if name else f"settings of {field.name}",
                    field.name,
                    cls,
                )
    lines.append("## Choices inside sections\n")
    while inside:
        path, hint = inside.pop(0)
        if id(hint) in shown:
            continue
        shown.add(id(hint))
        table = table_of(hint)
        for name, cls in (table or {"": hint}).items():
            section(f"{path}: {name}" if name else path, f"{path}.{name}" if name else path, cls)
    return "\n".join(lines)


def setup(app: Any) -> Mapping[str, Any]:
    """Tell Sphinx to write the page before it reads the others."""
    app.connect("builder-inited", lambda app: keep_page(Path(app.srcdir) / "settings.md", page()))
    return {"parallel_read_safe": True}


def keep_page(file: Path, text: str) -> None:
    """Write a page where it is not as it should be."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
