"""The package's own rules of size, and that its lazy names are those it declares."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import loki_kernels

PACKAGE = Path(loki_kernels.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 80, node.name


def test_type_checkers_and_python_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {alias.name for node in block.body for alias in node.names}
    assert declared | {"__version__"} == set(loki_kernels.__all__)
    for name in loki_kernels.__all__:
        assert getattr(loki_kernels, name) is not None
    assert set(loki_kernels.__all__) <= set(dir(loki_kernels))
    with pytest.raises(AttributeError, match="no attribute 'LokiLiner'"):
        _ = loki_kernels.LokiLiner


def test_help_imports_neither_torch_nor_transformers():
    script = (
        "import sys; from loki_kernels.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'slow'"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "attribute" in run.stdout
