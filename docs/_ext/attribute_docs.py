"""Leaves a colon in the docstring of a field or property alone, where napoleon would take what stands before it for a type."""

from collections.abc import Mapping
from typing import Any

STANDS_FOR_COLON = "\ue000"


def hide(_app: Any, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Replace the colons of the first paragraph."""
    end = lines.index("") if "" in lines else len(lines)
    if what in ("attribute", "property", "data"):
        lines[:end] = [line.replace(":", STANDS_FOR_COLON) for line in lines[:end]]


def show(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Put them back."""
    lines[:] = [line.replace(STANDS_FOR_COLON, ":") for line in lines]


def setup(app: Any) -> Mapping[str, Any]:
    """Stand around napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", hide, priority=400)
    app.connect("autodoc-process-docstring", show, priority=600)
    return {"parallel_read_safe": True}
