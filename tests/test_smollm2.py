"""What must hold on the real model; skipped where its wheel is not installed."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import loki_kernels as loki
from loki_kernels.attribution.reference import attribute_reference
from loki_kernels.demo.model import find_gguf, load_smollm2


@pytest.fixture(scope="module")
def smollm2():
    gguf = pytest.importorskip("gguf")
    try:
        find_gguf()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    with pytest.MonkeyPatch.context() as patch:
        # transformers reads the file's header three times, eight seconds each
        patch.setattr("gguf.GGUFReader", functools.cache(gguf.GGUFReader))
        return load_smollm2()


def test_is_a_plain_model_that_answers(smollm2):
    model, tokenizer = smollm2
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert getattr(model.config, "quantization_config", None) is None
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


def ranks(x):
    return x.argsort(-1).argsort(-1).double()


def test_bfloat16_agrees_with_float32_on_the_same_token(smollm2):
    """Spearman per layer 0.99 on average, target fixed."""
    model, tokenizer = smollm2
    prompts = [loki.load_questions(1)[0].prompt(tokenizer)]
    few = {"tokenizer": tokenizer, "steps": 2}  # bfloat16 takes 5 s a point of every layer
    exact = loki.attribute(model, prompts, **few)
    half = copy.deepcopy(model).to(torch.bfloat16)
    rounded = loki.attribute(half, prompts, target=exact.targets, **few)
    a, b = ranks(exact.scores), ranks(rounded.scores)
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    spearman = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert float(spearman.mean()) >= 0.99


def test_float32_is_as_close_to_float64_as_the_naive_procedure(smollm2):
    model, tokenizer = smollm2
    exact_model = copy.deepcopy(model).double()
    ids = torch.tensor(tokenizer(loki.load_questions(1)[0].text())["input_ids"][:16])
    scores = loki.attribute(model, [{"input_ids": ids}]).scores[0]
    for layer in (0, 29):
        one = range(layer, layer + 1)
        (exact,) = attribute_reference(exact_model, ids, layers=one)
        (naive,) = attribute_reference(model, ids, layers=one)
        error = float((scores[layer] - exact).norm() / exact.norm())
        assert error < 2 * float((naive - exact).norm() / exact.norm()) + 1e-6
