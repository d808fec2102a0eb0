"""What the pages say exists: the tree, the files, the commands, the recipes and the papers."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fedloom"
WRITTEN = ("settings.md", "imported_keys.md")
"""Made by Sphinx from the dataclasses and the importers' tables."""
DOCS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "docs").rglob("*.md")
    if "_build" not in path.parts and path.name not in WRITTEN
)
PAGES = [
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "PAPERS.md", "CHANGELOG.md"),
    *("SECURITY.md", *DOCS),
]
TREE = re.compile(r"^(?P<indent> *)(?P<names>[\w./*-]+(?:, [\w./*-]+)*/?)(?:  +\S.*)?$")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, kind: str) -> list[str]:
    """Return the contents of the fenced blocks of one kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


def told(text: str) -> set[str]:
    """Return the files an annotated tree names, `folder/` lines holding what is indented below them."""
    files: set[str] = set()
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = TREE.match(line)
        if not match:
            continue
        depth = len(match["indent"])
        above = [(at, folder) for at, folder in above if at < depth]
        folder = "".join(name for _, name in above)
        for name in match["names"].split(", "):
            if name.endswith("/"):
                above.append((depth, name))
            else:
                files.add(folder + name)
    return files


def actual() -> set[str]:
    """Return the files of the package that are written by hand; an empty __init__ needs no line."""
    files = {
        path for path in SOURCE.rglob("*") if path.is_file() and path.parts[-2] != "__pycache__"
    }
    return {
        str(path.relative_to(SOURCE.parent))
        for path in files
        if not (path.name == "__init__.py" and len(path.read_text().splitlines()) <= 1)
    }


def test_the_annotated_tree_is_the_tree():
    tree = told(blocks(page("ARCHITECTURE.md"), "text tree")[0])
    for pattern in [name for name in tree if "*" in name]:
        matches = {str(path.relative_to(SOURCE.parent)) for path in SOURCE.parent.glob(pattern)}
        assert matches, f"{pattern} names nothing"
        tree = tree - {pattern} | matches
    assert sorted(actual() - tree) == [], "not in ARCHITECTURE.md"
    assert sorted(tree - actual()) == [], "in ARCHITECTURE.md only"


def test_a_tree_is_read_by_its_indents():
    text = "a/\n  b.py  first  words\n  c/   a folder\n    d.py, e.py    two\n  f.py"
    assert told(text) == {"a/b.py", "a/c/d.py", "a/c/e.py", "a/f.py"}


def test_the_layers_are_those_that_are_checked():
    contracts = tomllib.loads(page("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["type"] == "layers")
    assert " -> ".join(layers) in blocks(page("ARCHITECTURE.md"), "text")[1]


@pytest.mark.parametrize("name", PAGES)
def test_links_and_named_files_exist(name: str):
    text, folder = page(name), (ROOT / name).parent
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)
    lost = [link for link in links if not (folder / link).exists()]
    assert not [link for link in lost if Path(link).name not in WRITTEN]
    named = re.findall(
        r"`((?:src|tests|benchmarks|scripts|docs|examples|\.ci|\.github)/[\w./-]+)`", text
    )
    missing = [p for p in named if not (ROOT / p).exists()]
    modules = re.findall(r"`([a-z_]+/[\w/]+\.py)`", text)
    missing += [p for p in modules if not ((SOURCE / p).exists() or (ROOT / p).exists())]
    assert not [p for p in missing if "NAME" not in p]


@pytest.mark.parametrize("name", PAGES)
def test_commands_exist(name: str):
    from fedloom.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]  # a group, not one command
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.M))
    shell = "\n".join(
        blocks(page(name), "(?:bash|sh|console)") + re.findall(r"`([^`\n]+)`", page(name))
    )
    for command in re.findall(r"^(?:\$ )?fedloom ([a-z]+)", shell, re.M):
        assert command in known
    for target in re.findall(r"^(?:\$ )?make ([a-z-]+)", shell, re.M):
        assert target in targets


@pytest.mark.parametrize("name", PAGES)
def test_recipes_named_in_commands_are_shipped(name: str):
    shipped = {path.stem for path in (SOURCE / "recipes").glob("*.yaml")}
    assert "quickstart" in shipped
    shell = "\n".join(
        blocks(page(name), "(?:bash|sh|console)") + re.findall(r"`([^`\n]+)`", page(name))
    )
    for recipe in re.findall(
        r"^(?:\$ )?fedloom (?:run|plan|data) ([a-z][\w-]*)(?=\s|$)", shell, re.M
    ):
        assert recipe in shipped


def test_every_algorithm_has_its_paper_entry():
    papers = page("PAPERS.md")
    for path in (SOURCE / "algorithms").glob("[!_]*.py"):
        assert f"algorithms/{path.name}" in papers


def test_the_changelog_has_the_version_of_the_package():
    version = re.search(r'^version = "(.+)"', page("pyproject.toml"), re.M)
    assert version
    assert f"## [{version[1]}]" in page("CHANGELOG.md")


def test_the_citation_is_of_this_package():
    cited = yaml.safe_load(page("CITATION.cff"))
    project = tomllib.loads(page("pyproject.toml"))["project"]
    assert {"cff-version", "message", "authors"} <= cited.keys()
    assert cited["title"].startswith(f"{project['name']}: ")
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
