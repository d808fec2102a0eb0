"""Benchmarks are no part of the package, and still import what there is."""

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("benchmarks/**/*.py"))


def imported(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedloom":
            yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_benchmark_imports_of_the_package_is_there(path: Path):
    missing = [
        f"{module}.{name}"
        for module, name in imported(path)
        if name not in dir(importlib.import_module(module))
        and importlib.util.find_spec(f"{module}.{name}") is None
    ]
    assert missing == []
