"""Every example runs, by its command line, on a tiny model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

import loki_kernels as loki
from tests.docs.conftest import NAME
from tests.models import changed_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXTS = "\n\n".join(" ".join(f"w{i + j}" for j in range(12)) for i in range(8))


@pytest.fixture
def run(reader, monkeypatch):
    Path("texts.txt").write_text(TEXTS)
    Path("other.txt").write_text(TEXTS.replace("w", "w1"))
    Path("rows.json").write_text("[[1, 5, 40], [0], [7, 3]]")

    def run(name, *arguments):
        path = EXAMPLES / f"{name}.py"
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80
        monkeypatch.setattr("sys.argv", [str(path), "--model", NAME, *arguments])
        return runpy.run_path(str(path), run_name="__main__")

    return run


def test_every_example_has_a_test():
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} <= tests


def test_sft(run):
    pytest.importorskip("trl")
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    Path("chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 4)
    run("sft", "--data", "chats.jsonl", "--rows", "rows.json", "--steps", "2", "--lr", "0.01")
    assert changed_rows("tuned-merged", NAME) == [1, 5, 40]


def test_trainer(run, capsys):
    pytest.importorskip("accelerate")
    data = ("--data", "texts.txt", "--general", "other.txt")
    run("trainer", *data, "--steps", "2", "--length", "16")
    assert "drift/kl" in capsys.readouterr().out
    assert len(changed_rows("tuned", NAME)) == 64


def test_attribution(run):
    pytest.importorskip("matplotlib")
    run("attribution", "--quota", "5")
    assert loki.RowSelection.load("analysis/rows.json").counts == [3, 3, 3]
    assert Path("analysis/heatmap.png").exists()


def test_two_tasks(run):
    run("two_tasks", "--first", "texts.txt", "--second", "other.txt", "--epochs", "1")
    assert len(changed_rows("both", NAME)) == 64


def test_quantized(run):
    pytest.importorskip("torchao")
    pytest.importorskip("peft.utils.quantization_utils", reason="needs peft 0.20")
    run("quantized", "--data", "texts.txt", "--rows", "rows.json", "--epochs", "1")
    assert changed_rows("adapter-merged", NAME) == [1, 5, 40]


def test_rows(reader):
    pytest.importorskip("matplotlib").use("Agg")
    notebook = json.loads((EXAMPLES / "rows.ipynb").read_text(encoding="utf-8"))
    names = {}
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "clear the notebook's outputs"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "examples/rows.ipynb", "exec"), names)
    assert loki.RowSelection.load("rows.json").counts == [6, 6, 6]
    assert all(0 <= share <= 1 for shares in names["shared"].values() for share in shares)
