"""Words that say a thing is unfinished, and paths that exist on one machine only."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".html", ".j2", ".css", ".js", ""}
UNFINISHED = re.compile(
    r"\b(TODO|FIXME|XXX|HACK|NotImplementedError|placeholder|for now|not implemented)\b", re.I
)
MACHINE = re.compile(r"(?<![\w.:/~])/(home|root|work|Users|mnt|opt)/\w")
NARRATION = re.compile(
    r"#.*\b(changed to|used to be|no longer needed|was moved|new version)\b", re.I
)
DYNAMIC = re.compile(r"\b(getattr|hasattr|setattr)\(|\*\*kwargs")


MADE = {"__pycache__", "_build", "settings.md", "imported_keys.md"}
"""Parts of the paths of files that are made, not written."""


def texts(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(p for p in found if p.is_file() and p.suffix in TEXT and not MADE & {*p.parts})


SOURCE = texts("src")
EVERYTHING = [
    *texts("src", "tests", "benchmarks", "scripts", "docs", "examples", ".ci", ".github"),
    *(path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT),
]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def hits(pattern: re.Pattern[str], path: Path) -> list[str]:
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return [f"{name(path)}:{number}: {line}" for number, line in lines if pattern.search(line)]


def test_the_guards_see_the_files():
    assert len(SOURCE) > 20
    assert {"README.md", "Makefile", "pyproject.toml"} <= {name(path) for path in EVERYTHING}


@pytest.mark.parametrize("path", SOURCE, ids=name)
def test_the_source_says_nothing_is_unfinished_and_tells_no_history(path: Path):
    assert not hits(UNFINISHED, path)
    if path.suffix == ".py":
        assert not hits(NARRATION, path)


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_no_file_names_a_folder_of_one_machine(path: Path):
    assert not hits(MACHINE, path)


def test_attributes_are_hardly_ever_looked_up_by_string():
    """Style: under 2 per 1,000 lines, what faces other libraries' models apart."""
    files = [p for p in SOURCE if p.suffix == ".py" and "models" not in p.parts]
    found = [hit for path in files for hit in hits(DYNAMIC, path)]
    lines = sum(len(path.read_text().splitlines()) for path in files)
    assert len(found) < 2 * lines / 1000, "\n".join(found)
