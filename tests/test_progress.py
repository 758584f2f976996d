"""Where a bar shows by itself."""

from __future__ import annotations

import io
import sys
from types import ModuleType

import pytest

from loki_kernels.progress import progress_bar


@pytest.mark.parametrize("where", ["file", "terminal", "notebook"])
def test_a_bar_shows_where_somebody_waits(where, monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: where == "terminal", raising=False)
    monkeypatch.setattr(sys, "stderr", stderr)
    if where == "notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    with progress_bar(2, "waiting") as bar:
        bar.update()
    assert ("waiting" in stderr.getvalue()) == (where != "file")
