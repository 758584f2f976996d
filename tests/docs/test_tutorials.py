"""Every block of every tutorial runs as it stands, in its order, on a tiny model of that name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import loki_kernels as loki
from tests.docs.conftest import NAME
from tests.models import changed_rows

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"


def run(page):
    text = (TUTORIALS / f"{page}.md").read_text(encoding="utf-8")
    names = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, f"docs/tutorials/{page}.md", "exec"), names)
    return names


def test_every_page_has_a_test():
    tests = {n.removeprefix("test_").replace("_", "-") for n in globals() if n.startswith("test_")}
    assert {page.stem for page in TUTORIALS.glob("*.md")} <= tests


def test_first(reader):
    names = run("first")
    assert names["drift"].overall.kl > 0
    assert len(changed_rows("library", NAME)) == 6
    loki.patch(names["tuned"].__class__.from_pretrained(NAME), "library")  # as the page ends


def test_chat(reader):
    pytest.importorskip("trl")
    run("chat")
    assert len(changed_rows("pirate-merged", NAME)) == 6


def test_reading(reader, capsys):
    pytest.importorskip("matplotlib")
    run("reading")
    assert "in common" in capsys.readouterr().out
    assert Path("heatmap.png").exists()
    assert loki.RowSelection.load("rows.json").counts == [6, 6, 6]


def test_two_tasks(reader):
    run("two-tasks")
    assert len(changed_rows("first", NAME)) == 64
    assert len(changed_rows("both", "first")) == 64


def test_quantized(reader):
    pytest.importorskip("torchao")
    pytest.importorskip("peft.utils.quantization_utils", reason="needs peft 0.21")
    run("quantized")
    assert len(changed_rows("merged-float32", NAME)) == 6


def test_eight_gpus(reader):
    Path("rows.json").write_text("[[1, 5, 40], [0], [7, 3]]")
    run("eight-gpus")
    assert changed_rows("out", NAME) == [1, 5, 40]
