"""The board's pages: templates of its own beside those of the report, and what a page loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.report.page import render

FOLDER = Path(__file__).parent / "pages"
ASSETS = {"board.js": "text/javascript", "board.css": "text/css"}
"""What a page loads, and nothing else; all of it comes with the package."""


def rendered(template: str, page: Mapping[str, Any]) -> str:
    """Return a template filled in; every value on it is escaped."""
    return render(template, page, folder=FOLDER)
