"""What must hold on the real model; skipped where its wheel is not installed."""

from __future__ import annotations

import copy

import pytest
import torch

import loki_kernels as loki
from loki_kernels.attribution.reference import attribute_reference
from loki_kernels.demo.model import find_gguf, load_smollm2


@pytest.fixture(scope="module")
def smollm2():
    try:
        find_gguf()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    return load_smollm2()


def ranks(x):
    return x.argsort(-1).argsort(-1).double()


def test_bfloat16_agrees_with_float32_on_the_same_token(smollm2):
    """Spearman per layer 0.99 on average, target fixed."""
    model, tokenizer = smollm2
    prompts = [question.prompt(tokenizer) for question in loki.load_questions(1)[:2]]
    exact = loki.attribute(model, prompts, tokenizer=tokenizer)
    half = copy.deepcopy(model).to(torch.bfloat16)
    rounded = loki.attribute(half, prompts, tokenizer=tokenizer, target=exact.targets)
    a, b = ranks(exact.scores), ranks(rounded.scores)
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    spearman = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert float(spearman.mean()) >= 0.99


def test_float32_is_as_close_to_float64_as_the_naive_procedure(smollm2):
    model, tokenizer = smollm2
    exact_model = copy.deepcopy(model).double()
    ids = torch.tensor(tokenizer(loki.load_questions(1)[0].text())["input_ids"])
    scores = loki.attribute(model, [{"input_ids": ids}]).scores[0]
    for layer in (0, 29):
        one = range(layer, layer + 1)
        (exact,) = attribute_reference(exact_model, ids, layers=one)
        (naive,) = attribute_reference(model, ids, layers=one)
        error = float((scores[layer] - exact).norm() / exact.norm())
        assert error < 2 * float((naive - exact).norm() / exact.norm()) + 1e-6
