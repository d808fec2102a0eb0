"""A file is one idea: what outgrows these lines is two."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fedloom"
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(path.relative_to(SOURCE)) for path in FILES]

FILE, ALGORITHM, FUNCTION, PUBLIC = 300, 150, 50, 5
WIDE = {
    "cli.py": "one function a command",
    "cli_sites.py": "one function a command",
    "core/params.py": "arithmetic, one short function an operation",
    "core/protocols.py": "the words every other module speaks",
    "data/partition.py": "a family: one class an entry of the table PARTITIONS",
    "deploy/site.py": "a site's settings, its session, and what it answers",
    "engines/mail.py": "letters, the post that carries them, and each way in which one is lost",
    "models/build.py": "settings, model and the two names a model goes by",
    "models/parts.py": "one small class a part, and how each is found",
    "recipe.py": "both ways: text to recipe, recipe to text",
    "run/loop.py": "a round is drawn, tasks are made, the run advances or is measured",
    "run/reading.py": "one short function a file",
    "run/report_figures.py": "one function a picture",
    "run/wording.py": "one short function a wording",
    "server/optimizers.py": "a family: one class an entry of the table SERVER_OPTIMIZERS",
    "server/samplers.py": "a family: one class an entry of the table SAMPLERS",
}
"""Modules of more than five public names, and why; at most one in seven."""


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield each function with its lines, docstring not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno
            lines = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                assert first.end_lineno
                lines -= first.end_lineno - first.lineno + 1
            yield node.name, lines


def public(tree: ast.Module) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]


def test_the_guards_see_the_source():
    assert len(FILES) > 20
    assert set(NAMES) >= WIDE.keys()
    assert len(WIDE) <= len(FILES) / 7


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_and_its_functions_stay_short(path: Path):
    text = path.read_text()
    limit = ALGORITHM if path.parent.name == "algorithms" else FILE
    assert len(text.splitlines()) <= limit
    long = {name: lines for name, lines in functions(ast.parse(text)) if lines > FUNCTION}
    assert not long


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_module_offers_few_names(path: Path):
    names = public(ast.parse(path.read_text()))
    if str(path.relative_to(SOURCE)) in WIDE:
        assert len(names) > PUBLIC, "no longer an exception: take it off the list"
    else:
        assert len(names) <= PUBLIC, names


def test_a_function_that_is_too_long_is_seen():
    body = "\n".join(f"    x = {at}" for at in range(FUNCTION))
    assert list(functions(ast.parse(f"def f():\n    '''Say.'''\n{body}"))) == [("f", FUNCTION + 1)]
