"""What autodoc and napoleon would spoil: colons in the docstrings of fields, names of types in signatures."""

import re
from collections.abc import Mapping
from typing import Any

STANDS_FOR_COLON = "\ue000"
ALIASES = {
    "Mapping[str, Mapping[str, Tensor]]": "Payload",
    "Mapping[str, Tensor]": "Params",
    "Mapping[str, float]": "Metrics",
}


def hide(_app: Any, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Replace the colons of a field's first paragraph: napoleon takes what stands before one for a type."""
    end = lines.index("") if "" in lines else len(lines)
    if what in ("attribute", "property", "data"):
        lines[:end] = [line.replace(":", STANDS_FOR_COLON) for line in lines[:end]]


def show(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Put them back."""
    lines[:] = [line.replace(STANDS_FOR_COLON, ":") for line in lines]


def named(text: str | None) -> str | None:
    """Return a signature with types as the source names them."""
    if text is None:
        return None
    text = re.sub(r"~?(?:\w+\.)+(?=[A-Z])", "", text.replace("<factory>", "{}"))
    for long, short in ALIASES.items():
        text = text.replace(long, short)
    return text


def sign(
    _app: Any,
    _what: str,
    _name: str,
    _obj: Any,
    _options: Any,
    given: str | None,
    gives: str | None,
) -> tuple[str | None, str | None]:
    """Rewrite a signature and what it returns."""
    return named(given), named(gives)


def setup(app: Any) -> Mapping[str, Any]:
    """Stand around napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", hide, priority=400)
    app.connect("autodoc-process-docstring", show, priority=600)
    app.connect("autodoc-process-signature", sign)
    return {"parallel_read_safe": True}
