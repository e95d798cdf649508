"""What the documents say of the tests is true: each test that they name is there, so that the table of faults in
docs/reliability.md cannot rot."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.tools import ROOT

NAMED = re.compile(r"\b(tests/[\w/]+\.py)::(\w+)")
DOCUMENTS = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])


@cache
def functions(path: Path) -> frozenset[str]:
    """The tests of a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_a_document_names_are_there(document: Path) -> None:
    for path, name in NAMED.findall(document.read_text()):
        file = ROOT / path
        assert file.is_file(), f"{document.name} names {path}, which is not there"
        assert name in functions(file) and name.startswith("test_"), f"{document.name}: {path} has no {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tools_that_a_document_names_are_there(document: Path) -> None:
    """`python -m tests...`: a module, or a package that can be run."""
    for module in re.findall(r"python -m (tests[\w.]+)", document.read_text()):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{document.name} names {module}"


def test_the_table_names_tests_in_each_row() -> None:
    """A row of a fault without a test says nothing. Rows of the tables of faults have six columns."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and line.count(" | ") >= 5]
    rows = [row for row in rows if not row.startswith("| fault")]
    assert len(rows) > 60
    assert [row for row in rows if not NAMED.search(row)] == []


def test_a_name_that_is_not_there_is_noticed() -> None:
    assert NAMED.findall("see `tests/unit/test_docs.py::test_nothing`") == [("tests/unit/test_docs.py", "test_nothing")]
    assert "test_nothing" not in functions(Path(__file__))
