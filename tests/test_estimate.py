"""``loki-kernels estimate``: operations by count, and time and memory of what was timed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from loki_kernels import attribute
from loki_kernels.attribution.definitions import PathIntegral
from loki_kernels.cli import main
from loki_kernels.discovery import find_structure
from loki_kernels.errors import UnsupportedModelError
from loki_kernels.estimate import Shape, _peak, _whole_peak, estimate
from tests.architectures import falcon_h1, glm_moe
from tests.models import build_model

PROMPTS, TOKENS, STEPS = 3, 11, 4


@pytest.mark.parametrize("definition", ["published", "paper", "captum"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_products_are_those_that_torch_counts(name, definition):
    model = build_model(name)
    batch = [{"input_ids": torch.randint(0, 97, (PROMPTS, TOKENS))}]
    attribute(model, batch, steps=STEPS, definition=definition)  # the model is tried once
    with FlopCounterMode(display=False) as counter:
        attribute(model, batch, steps=STEPS, definition=definition)
    structure = find_structure(model)
    shape = replace(Shape.of(structure), queries=0)  # torch does not look into our attention
    cost = shape.cost(PROMPTS, TOKENS, PathIntegral.resolve(definition, {}, STEPS))
    # the head of each prefill, and of each comparison with it; the points' is an op of ours
    heads = 2 if definition != "captum" else 2 + len(structure.layers)
    seen = PROMPTS * 2 * shape.head * heads
    assert counter.get_total_flops() == cost.layers + seen


@pytest.fixture
def folder(base_folder, tmp_path):
    questions = tmp_path / "mine.jsonl"
    questions.write_text("".join(json.dumps({"text": "w1 " * (3 + i)}) + "\n" for i in range(12)))
    return base_folder, questions


def test_the_command(folder, capsys):
    base, questions = folder
    command = ["estimate", str(base), "--questions", str(questions), "--batch-size", "4"]
    assert main([*command, "--steps", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "12, 102 tokens, 3 batches" in said
    assert "FLOPs" in said
    assert "seconds on this CPU" in said
    assert main([*command, "--steps", "2", "--device", "cpu", "--gpus", "3"]) == 0
    assert "seconds on 3 of this CPU" in capsys.readouterr().out


def test_more_devices_take_less(folder, monkeypatch):
    base, _ = folder
    prompts = [{"input_ids": [1, 2, 3]}] * 12
    one, three = (estimate(base, prompts, gpus=n, batch_size=2, device="cpu") for n in (1, 3))
    assert one.cost == three.cost
    assert (one.batches, one.tokens, one.prompts) == (6, 36, 12)
    # a share of each device's own timing, which another program may have slowed down
    assert three.seconds < one.seconds * 3


def test_activations_of_a_deep_model_follow_from_shallow_ones():
    """With as many points each: 60 of one layer, 20 of each of 3, 10 of each of 6."""
    shape = Shape.of(find_structure(build_model()))
    ids = torch.randint(0, 97, (PROMPTS, TOKENS))
    kept = {}
    for layers in (1, 3, 6):
        config = build_model().config
        config.num_hidden_layers = layers
        model = type(build_model())(config).eval()

        def run(model=model, steps=60 // layers):
            attribute(model, [{"input_ids": ids}], steps=steps, batch_size=PROMPTS)

        run()
        kept[layers] = _peak(run, model, torch.device("cpu"))
    want = _whole_peak([kept[1], kept[3]], replace(shape, layers=6), ids.numel() * 4)
    assert want == pytest.approx(kept[6], rel=0.1)


def test_what_cannot_be_attributed_is_refused(tmp_path):
    transformers.MambaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="has an FFN"):
        estimate(tmp_path, [{"input_ids": [1]}])


@pytest.mark.parametrize("build", [glm_moe, falcon_h1])
def test_mixtures_and_hybrids(build, base_folder, tmp_path):
    """The tokenizer's folder with another config."""
    shutil.copytree(base_folder, tmp_path, dirs_exist_ok=True)
    build().config.save_pretrained(tmp_path)
    prompts = [{"input_ids": [1, 2, 3]}] * 4
    result = estimate(tmp_path, prompts, batch_size=2, device="cpu", steps=2)
    assert result.engine == ("staircase" if build is glm_moe else "decode")
    assert f"by the {result.engine} engine" in str(result)


def test_a_token_passes_some_experts():
    model = glm_moe()
    structure = find_structure(model)
    for layer in structure.layers:
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model.model(input_ids=torch.arange(7)[None], use_cache=False)
    shape = replace(Shape.of(structure), queries=0)
    # what grouped products take is not counted by torch, nor routers that are no linear layer
    assert counter.get_total_flops() < 2 * 7 * shape.weights * shape.layers
    dense = sum(p.numel() for x in structure.layers for p in x.parameters() if p.ndim > 1)
    assert shape.weights * shape.layers < dense
