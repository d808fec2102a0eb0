"""Writes imported_keys.md before Sphinx reads: what every key of other frameworks is here, from the importers' own tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from settings_page import keep_page

from fedloom.importing.counterparts import Counterpart
from fedloom.importing.document import FRAMEWORKS

HEAD = """# Keys of other frameworks

What `fedloom recipes import` makes of them: the very tables it goes by. `a.*` is every key below `a` that has no row of its
own; a key that has no row at all is listed as unknown, never dropped. A row without settings says why nothing stands for it.
"""
HEADINGS = "| key | here | |\n|---|---|---|"


def row(counterpart: Counterpart) -> str:
    """Return the row of one key."""
    settings = f"`{counterpart.settings}`" if counterpart.settings else "none"
    default = f"its default: `{counterpart.default}`" if counterpart.has_default else ""
    remark = "; ".join(filter(None, (counterpart.remark, default)))
    return f"| `{counterpart.key}` | {settings} | {remark.replace('|', '/')} |"


def page() -> str:
    """Return imported_keys.md."""
    parts = [HEAD]
    for framework in FRAMEWORKS:
        parts += [f"## {framework.name}\n", *(f"{note}\n" for note in framework.notes)]
        parts += [HEADINGS, *sorted(map(row, framework.table)), ""]
    return "\n".join(parts)


def setup(app: Any) -> Mapping[str, Any]:
    """Tell Sphinx to write the page before it reads the others."""
    file = "imported_keys.md"
    app.connect("builder-inited", lambda app: keep_page(Path(app.srcdir) / file, page()))
    return {"parallel_read_safe": True}
