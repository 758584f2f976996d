"""docs/trainers.md: a cell that says more than "not tried" names the test that holds it to that."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "trainers.md").read_text(encoding="utf-8")
TABLE = TEXT.partition("\n\n|")[2].partition("\n\n")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines()[2:]]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_cells_have_tests(row):
    _, *cells, tests = row
    assert set(cells) <= {"works", "refused", "not tried"}
    named = re.findall(r"`(\S+)::(\w+)`", tests)
    assert bool(named) == (set(cells) != {"not tried"})
    for file, test in named:
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
