"""README is short, and its quick start runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.conftest import NAME
from tests.models import changed_rows

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_is_short():
    assert len(README.split()) <= 1500


def test_quick_start_runs(reader, capsys):
    block = re.search(r"^## Quick start\n.*?```python\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    exec(compile(block[1], "README: Quick start", "exec"), {})
    printed = capsys.readouterr().out
    assert "3 down-projections patched" in printed
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < losses[0]
    assert len(changed_rows("ada", NAME)) == 64
