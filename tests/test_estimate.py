"""``loki-kernels estimate``: operations by count, and time and memory of what was timed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.device_memory import device_memory
from loki_kernels import attribute
from loki_kernels.attribution import steering
from loki_kernels.attribution.definitions import PathIntegral
from loki_kernels.cli import main
from loki_kernels.cut import Cut, _kinds_of
from loki_kernels.discovery import find_structure
from loki_kernels.errors import UnsupportedModelError
from loki_kernels.estimate import Shape, _peak, _Speed, _whole_peak, estimate
from loki_kernels.inspection import build_model as build_cut
from loki_kernels.structure import Structure
from tests.architectures import falcon_h1, glm_moe, llava
from tests.models import build_model
from tests.zoo.build import build as zoo_build

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
    monkeypatch.setattr(_Speed, "measure", lambda *_: _Speed(1e-9, 1e-9, 0.0))
    prompts = [{"input_ids": [1, 2, 3]}] * 12
    one, three = (estimate(base, prompts, gpus=n, batch_size=2, device="cpu") for n in (1, 3))
    assert one.cost == three.cost
    assert (one.batches, one.tokens, one.prompts) == (6, 36, 12)
    assert three.seconds == pytest.approx(one.seconds / 3)


@pytest.mark.parametrize(("engine", "batches"), [("staircase", 1), ("decode", 3)])
def test_batches_are_those_that_attribute_makes(engine, batches, folder, monkeypatch):
    """Many points fit: an engine that gains nothing by them takes as many as ever."""
    base, _ = folder
    monkeypatch.setattr(_Speed, "measure", lambda *_: _Speed(1e-9, 1e-9, 0.0))
    monkeypatch.setattr("loki_kernels.estimate._engine", lambda *_: engine)
    monkeypatch.setattr("loki_kernels.estimate.points_that_fit", lambda *_, **__: 10**6)
    monkeypatch.setattr("loki_kernels.attribution.plan._POINTS", 4 * 3 * 7)  # of 4 prompts
    result = estimate(base, [{"input_ids": [1, 2, 3]}] * 12, device="cpu")
    assert result.batches == batches


@pytest.mark.parametrize(
    ("engine", "definition", "lengths", "largest"),
    [
        ("staircase", "published", [70] * 3 + [20] * 10, (10, 20)),  # has fewer tokens, more points
        ("staircase", "captum", [70] * 3 + [20] * 6, (3, 70)),  # whose points have all tokens' keys
        ("decode", "published", [150] + [20] * 10, (1, 150)),  # takes a prompt after the other
    ],
)
def test_the_batch_that_keeps_most_is_measured(
    engine, definition, lengths, largest, base_folder, monkeypatch
):
    measured = []

    def measure(*given):
        measured.append(given[5])
        return _Speed(1e-9, 1e-9, 0.0)

    monkeypatch.setattr(_Speed, "measure", measure)
    monkeypatch.setattr("loki_kernels.estimate._engine", lambda *_: engine)
    monkeypatch.setattr("loki_kernels.estimate.points_that_fit", lambda *_, **__: 210)
    prompts = [{"input_ids": [1] * length} for length in lengths]
    estimate(base_folder, prompts, definition=definition, device="cpu")
    assert measured == [largest]


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
    want = _whole_peak([kept[1], kept[3]], (1, 3), 6, shape.prefix * ids.numel() * 4)
    assert want == pytest.approx(kept[6], rel=0.1)


def test_what_cannot_be_attributed_is_refused(tmp_path):
    transformers.MambaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="has an FFN"):
        estimate(tmp_path, [{"input_ids": [1]}])


def test_the_engine_is_that_of_the_definition(base_folder, tmp_path, monkeypatch):
    """Known before anything is timed: a hybrid is attributed by decode, which refuses captum's."""
    shutil.copytree(base_folder, tmp_path, dirs_exist_ok=True)
    falcon_h1().config.save_pretrained(tmp_path)
    monkeypatch.setattr(_Speed, "measure", lambda *_: _Speed(1e-9, 1e-9, 0.0))
    prompts = [{"input_ids": [1, 2, 3]}]
    assert estimate(tmp_path, prompts, device="cpu").engine == "decode"
    assert estimate(base_folder, prompts, device="cpu", definition="captum").engine == "staircase"
    with pytest.raises(UnsupportedModelError, match="path='sequence' scales every token"):
        estimate(tmp_path, prompts, device="cpu", definition="captum")


def test_what_trying_an_engine_takes_is_none_of_the_batchs(base_folder):
    """Sixteen tokens are tried, and three of few points are attributed."""
    result = estimate(base_folder, [{"input_ids": [1, 2, 3]}], device="cpu", steps=1)
    config = transformers.AutoConfig.from_pretrained(base_folder)
    whole, (few, many) = config.num_hidden_layers, Cut.find(config).timed
    peaks = []
    for layers in (few, many):
        cut = Cut.find(config).of(config, layers)
        model, steps = build_cut(cut, torch.device("cpu"), torch.float32).eval(), whole // layers

        def run(model=model, steps=steps):
            attribute(model, [{"input_ids": [1, 2, 3]}], steps=steps)

        run()
        peaks.append(_peak(run, model, torch.device("cpu")))
    prefix = Shape.of(find_structure(model)).prefix * 3 * 4
    assert result.activations == pytest.approx(_whole_peak(peaks, (few, many), whole, prefix))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_config_of_several_parts_says_its_dtype_once(dtype, base_folder, tmp_path, monkeypatch):
    """At its top, as Llava's checkpoints do; the part of the text may have none."""
    shutil.copytree(base_folder, tmp_path, dirs_exist_ok=True)
    model = llava()
    whole = model.config.to_dict() | {"dtype": dtype}
    whole["text_config"].pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(whole))
    monkeypatch.setattr(_Speed, "measure", lambda *_: _Speed(1e-9, 1e-9, 0.0))
    monkeypatch.setattr("loki_kernels.estimate._engine", lambda *_: "decode")
    size = getattr(torch, dtype).itemsize
    result = estimate(tmp_path, [{"input_ids": [1, 2, 3]}], device="cpu")
    assert result.weights == size * sum(p.numel() for p in model.parameters())


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


def test_memory_by_count_is_what_is_kept(monkeypatch):
    """Of a batch whose prompts are of one length, run again a layer at a time or not."""
    config = build_model(device="cpu").config
    size = {"prompts": PROMPTS, "tokens": TOKENS, "steps": STEPS, "dtype": torch.float32}
    model = type(build_model())(config).eval()
    ids = torch.randint(0, 97, (PROMPTS, TOKENS))

    def run():
        attribute(model, [{"input_ids": ids}], steps=STEPS, batch_size=PROMPTS)

    run()
    want = device_memory(config, "device_map", **size)
    assert want.points + want.prefix == pytest.approx(
        _peak(run, model, torch.device("cpu")), rel=0.1
    )
    inputs = []
    checkpoint = steering.checkpoint

    def counting(function, *args, **options):
        inputs.append(args[0].nbytes)
        return checkpoint(function, *args, **options)

    monkeypatch.setattr(steering, "checkpoint", counting)
    monkeypatch.setattr(Structure, "reruns", True)
    run()
    rerun = device_memory(config, "offloaded", **size)
    assert len(inputs) == len(model.model.layers)
    assert sum(inputs) < rerun.points < want.points


def gpu_table():
    """The lines of docs/analysis.md, from configs of the published models' sizes."""

    def llama(width, neurons, layers, heads):
        return transformers.LlamaConfig(
            hidden_size=width, intermediate_size=neurons, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=8, vocab_size=128256,
        )  # fmt: skip

    configs = {
        "Llama 8B": llama(4096, 14336, 32, 32),
        "Llama 70B": llama(8192, 28672, 80, 64),
        "Llama 405B": llama(16384, 53248, 126, 128),
        "Qwen3-235B-A22B": transformers.Qwen3MoeConfig(
            hidden_size=4096, moe_intermediate_size=1536, num_hidden_layers=94,
            num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128,
            num_experts_per_tok=8, vocab_size=151936,
        ),
    }  # fmt: skip
    ways = {
        "1 GPU": ("device_map", 1),
        "1 GPU, offloaded": ("offloaded", 1),
        "`device_map`, 8": ("device_map", 8),
        "FSDP2, 8": ("fsdp2", 8),
        "FSDP2, 64": ("fsdp2", 64),
    }
    for name, config in configs.items():
        for where, (way, devices) in ways.items():
            found = device_memory(config, way, devices)
            parts = found.weights, found.gathered, found.prefix, found.points, found.total
            yield f"| {name} | {where} | " + " | ".join(f"{x / 1e9:.1f}" for x in parts) + " |"


def test_the_table_in_the_documentation_is_this_count():
    text = (Path(__file__).parents[1] / "docs" / "analysis.md").read_text()
    assert "\n".join(gpu_table()) in text


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("Qwen3NextForCausalLM", "decode"),
        ("JambaForCausalLM", "decode"),
        ("NemotronHForCausalLM", "decode"),
        ("Lfm2ForCausalLM", "decode"),
        ("Gemma4ForCausalLM", None),
        ("Glm4MoeForCausalLM", "staircase"),
        ("Llama4ForCausalLM", "staircase"),
    ],
)
def test_what_is_timed_has_layers_of_every_kind(name, engine, base_folder, tmp_path):
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    shutil.copytree(base_folder, tmp_path, dirs_exist_ok=True)
    model = zoo_build(name)
    model.config.save_pretrained(tmp_path)
    cut = Cut.find(model.config)
    layers = len(find_structure(model).layers)
    whole = _kinds_of(Cut(0, layers).of(model.config, layers))
    for few in cut.timed:
        kinds = _kinds_of(cut.of(model.config, few))
        assert len(kinds) == few
        assert set(kinds) == set(whole)
    result = estimate(tmp_path, [{"input_ids": [1, 2, 3]}] * 2, device="cpu", steps=1)
    assert engine in (None, result.engine)


def test_a_cut_has_the_shares_of_the_whole():
    """Of layers as large hybrids have them: 3 to 1, and attention in 4 of 40."""
    small = zoo_build("Qwen3NextForCausalLM").config
    small.num_hidden_layers = 16
    small.layer_types = (["linear_attention"] * 3 + ["full_attention"]) * 4
    assert Cut.find(small) == Cut(0, 4)
    hybrid = zoo_build("NemotronHForCausalLM").config
    rest = ["linear_attention", "moe"]
    hybrid.layers_block_type = [*rest, *rest, "full_attention", *rest, *rest, *rest] * 4
    cut = Cut.find(hybrid)
    assert "full_attention" in cut.of(hybrid, cut.count).layers_block_type
    assert cut.count > 3


def test_dense_first_layers_are_not_timed():
    config = zoo_build("Glm4MoeForCausalLM").config
    config.num_hidden_layers, config.first_k_dense_replace = 30, 1
    cut = Cut.find(config)
    assert cut.count == 1
    assert cut.start >= 1


def test_a_config_that_cannot_be_cut_is_refused(monkeypatch):
    monkeypatch.setattr(Cut, "_builds", lambda *_, **__: False)
    with pytest.raises(UnsupportedModelError, match="does not say how to build a few"):
        Cut.find(build_model().config)
