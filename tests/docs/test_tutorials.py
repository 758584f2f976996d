"""Every block of every tutorial runs as it stands, in its order, on a tiny model of that name.

So do those of two other pages, with few questions and samples.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loki_kernels as loki
from tests.docs.conftest import NAME
from tests.models import changed_rows

DOCS = Path(__file__).parents[2] / "docs"


def run(page, **names):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, f"docs/{page}.md", "exec"), names)
    return names


def test_every_page_has_a_test():
    tests = {n.removeprefix("test_").replace("_", "-") for n in globals() if n.startswith("test_")}
    assert {page.stem for page in (DOCS / "tutorials").glob("*.md")} <= tests


def test_first(reader):
    names = run("tutorials/first")
    assert names["drift"].overall.kl > 0
    assert names["trainer"].evaluate(names["dataset"])["eval_loss"] > 0  # of unequal lengths
    assert len(changed_rows("library", NAME)) == 64
    loki.patch(names["tuned"].__class__.from_pretrained(NAME), "library")  # as the page ends


def test_chat(reader):
    pytest.importorskip("trl")
    run("tutorials/chat")
    assert len(changed_rows("pirate-merged", NAME)) == 64


def test_reading(reader, capsys):
    pytest.importorskip("matplotlib")
    run("tutorials/reading")
    assert "in common" in capsys.readouterr().out
    assert Path("heatmap.png").exists()
    assert loki.RowSelection.load("rows.json").counts == [6, 6, 6]


def test_two_tasks(reader):
    run("tutorials/two-tasks")
    assert len(changed_rows("first", NAME)) == 64
    assert len(changed_rows("both", "first")) == 64


def test_quantized(reader):
    pytest.importorskip("torchao")
    pytest.importorskip("peft.utils.quantization_utils", reason="needs peft 0.20")
    run("tutorials/quantized")
    assert len(changed_rows("merged-float32", NAME)) == 6


def test_eight_gpus(reader):
    Path("rows.json").write_text("[[1, 5, 40], [0], [7, 3]]")
    run("tutorials/eight-gpus")
    assert changed_rows("out", NAME) == [1, 5, 40]


def run_on_few_questions(page, monkeypatch):
    few = loki.load_questions(1)[::6]
    monkeypatch.setattr(loki, "load_questions", lambda: few, raising=False)
    model = AutoModelForCausalLM.from_pretrained(NAME)
    tokenizer = AutoTokenizer.from_pretrained(NAME)
    return run(page, loki=loki, model=model, tokenizer=tokenizer)


def test_concepts(reader, monkeypatch):
    pytest.importorskip("matplotlib")
    names = run_on_few_questions("concepts", monkeypatch)
    assert Path("heatmap.png").exists()
    assert torch.equal(loki.Attribution.load("scores.safetensors").scores, names["scores"].scores)
    assert names["handle"].rows == loki.RowSelection.load("rows.json")
    assert names["handle"].rows.counts == [6, 6, 6]
    # the last block's handle is not kept
    layers = [x for x in names["model"].modules() if isinstance(x, loki.LokiLinear)]
    assert [len(layer.index) for layer in layers] == [64] * 3
    assert all(layer.protected for layer in layers)


def test_protection(reader, monkeypatch):
    handle = run_on_few_questions("protection", monkeypatch)["handle"]
    saved = loki.Protection.load("protection.safetensors")
    assert handle.protection.fingerprint == saved.fingerprint
    assert handle.rows.counts == [64] * 3
