"""What the pages for people from captum and from the authors' repository say is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import loki_kernels as loki
from tests.models import build_model, to_device

PAGES = Path(__file__).parents[2] / "docs" / "migration"
CAPTUM = (PAGES / "captum.md").read_text(encoding="utf-8")
RULES = re.findall(r'^\| `method="(\w+)"`.*?\| `rule="([\w-]+)"`', CAPTUM, re.M)


def _captums(model, prompt, target, layer, *, score=torch.softmax, inputs=False, **options):
    """captum's scores at the last token of ``prompt`` ``[T]``, of one layer's down-projection."""
    attr = pytest.importorskip("captum.attr")
    multiply = options.pop("multiply_by_inputs", True)

    def forward(ids):
        return score(model(ids, use_cache=False).logits[:, -1], -1)

    module = model.model.layers[layer].mlp.down_proj
    explainer = attr.LayerIntegratedGradients(forward, module, multiply_by_inputs=multiply)
    found = explainer.attribute(
        prompt[None], target=target, n_steps=5, attribute_to_layer_input=inputs, **options
    )
    return found[0, -1].cpu()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [({"method": method}, {"rule": rule}) for method, rule in RULES]
    + [
        ({"method": "riemann_trapezoid", "multiply_by_inputs": False}, {"multiply": False}),
        ({"method": "riemann_trapezoid", "inputs": True}, {"site": "ffn_neurons"}),
        (
            {"method": "riemann_trapezoid", "score": lambda logits, _: logits},
            {"objective": "logit"},
        ),
    ],
)
def test_captums_options(theirs, ours, prompts):
    assert len(RULES) == 5
    model = build_model(dtype=torch.float64)
    result = loki.attribute(model, prompts[1:2], definition="captum", steps=5, **ours)
    prompt, target = to_device(prompts[1]["input_ids"]), int(result.targets[0])
    for layer in range(3):
        want = _captums(model, prompt, target, layer, **theirs)
        torch.testing.assert_close(result.scores[0, layer].double(), want, rtol=1e-5, atol=1e-8)


def test_authors_files(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    Path("10.json").write_text(json.dumps([[1, 5, 40], [0], [7, 3]]))
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 3, 48, generator=generator)
    with h5py.File("kva_mmlu.h5", "w") as file:
        file.create_dataset("dataset", data=scores.half().numpy())
    names = {"model": build_model()}
    blocks = re.findall(
        r"^```python\n(.*?)^```", (PAGES / "authors.md").read_text("utf-8"), re.S | re.M
    )
    for block in blocks:
        exec(compile(block, "docs/migration/authors.md", "exec"), names)
    assert names["handle"].rows.counts == [3, 1, 2]
    assert names["rows"] == loki.select(scores.half().float(), 10.0, criterion="signed")
