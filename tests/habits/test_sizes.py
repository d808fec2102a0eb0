"""A file is one idea: what outgrows these lines is two."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fedloom"
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(path.relative_to(SOURCE)) for path in FILES]

FILE, ALGORITHM, FUNCTION = 400, 200, 50


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


def test_the_guards_see_the_source():
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_and_its_functions_stay_short(path: Path):
    text = path.read_text()
    limit = ALGORITHM if path.parent.name == "algorithms" else FILE
    assert len(text.splitlines()) <= limit
    long = {name: lines for name, lines in functions(ast.parse(text)) if lines > FUNCTION}
    assert not long


def test_a_function_that_is_too_long_is_seen():
    body = "\n".join(f"    x = {at}" for at in range(FUNCTION))
    assert list(functions(ast.parse(f"def f():\n    '''Say.'''\n{body}"))) == [("f", FUNCTION + 1)]
