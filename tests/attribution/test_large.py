"""Models that accelerate keeps on disk. On the CPU, whatever --device says."""

from __future__ import annotations

import weakref

import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from accelerate.utils import OffloadedWeightsLoader
from packaging.version import Version

import loki_kernels as loki
from loki_kernels.structure import Structure
from tests.architectures import falcon_h1, glm_moe
from tests.attribution.results import assert_same
from tests.models import GQA, build_model, snapshot

PROMPTS = [{"input_ids": [1 + i, 5, *range(2, 4 + i)]} for i in range(3)]


def offloaded(model, folder, *, stay=()):
    """All parts on disk, but those that stay where they are."""
    parts = [f"model.{name}" for name, _ in model.model.named_children() if name != "layers"]
    parts += ["lm_head", *(f"model.layers.{i}" for i in range(len(model.model.layers)))]
    places = {name: "cpu" if name in stay else "disk" for name in parts}
    return dispatch_model(model, places, offload_dir=folder, force_hooks=True)


def flags_and_hooks(model):
    """All that a caller could see changed but the parameters, which accelerate makes anew."""
    found = {k: v for k, v in snapshot(model).items() if k not in ("weights", "identity")}
    found["places"] = {k: (p.device, p.shape) for k, p in model.named_parameters()}
    found["forward"] = {k: m.__dict__.get("forward") for k, m in model.named_modules()}
    return found


@pytest.mark.parametrize(
    ("name", "engine", "definition"),
    [
        ("llama", "staircase", "published"),
        ("llama", "decode", "published"),
        ("llama", "reforward", "captum"),
        ("llama_mlp_bias", "staircase", "captum"),  # tied to the embedding
        ("gemma2", "staircase", "published"),
        ("gemma2", "decode", "published"),
        ("glm_moe", "staircase", "published"),
        ("falcon_h1", "decode", "published"),  # a state that is written in place
    ],
)
def test_scores_have_the_bits_of_a_model_in_memory(name, engine, definition, tmp_path):
    own = {"glm_moe": glm_moe, "falcon_h1": falcon_h1}
    build = own.get(name, lambda: build_model(name, device="cpu"))
    options = {"definition": definition, "engine": engine, "steps": 3}
    if Version(transformers.__version__) < Version("5.1") and (name, engine) == (
        "gemma2",
        "decode",
    ):
        pytest.skip("refused in memory too")
    want = loki.attribute(build(), PROMPTS, **options)
    model = offloaded(build(), tmp_path, stay=("model.layers.1",))
    model.model.layers[2].requires_grad_(False)
    before = flags_and_hooks(model)
    assert_same(loki.attribute(model, PROMPTS, **options), want)
    assert flags_and_hooks(model) == before


def test_cpu_offload():
    want = loki.attribute(build_model(device="cpu"), PROMPTS)
    model = build_model(device="cpu")
    cpu_offload(model)
    assert_same(loki.attribute(model, PROMPTS), want)


def deep_model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**(GQA | {"num_hidden_layers": 8}))
    ).eval()


@pytest.fixture
def alive(monkeypatch):
    """Bytes of weights read from disk that are still referred to: now, and at most."""
    found = {"now": 0, "most": 0}
    read = OffloadedWeightsLoader.__getitem__

    def gone(size):
        found["now"] -= size

    def counting(self, name):
        values = read(self, name).numpy().copy()
        found["now"] += values.nbytes
        found["most"] = max(found.values())
        weakref.finalize(values, gone, values.nbytes)
        return torch.from_numpy(values)  # refers to the array as long as anything has its storage

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counting)
    return found


@pytest.mark.parametrize("engine", ["staircase", "decode", "reforward"])
def test_weights_on_disk_are_never_all_in_memory(engine, alive, tmp_path, monkeypatch):
    model = offloaded(deep_model(), tmp_path)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    others = sum(p.nbytes for p in (model.lm_head.weight, model.model.embed_tokens.weight))
    options = {"engine": engine, "steps": 2, "batch_size": 2}
    got = loki.attribute(model, PROMPTS, **options)
    assert alive["now"] == 0
    assert alive["most"] < 1.1 * layer + others
    # without running layers again autograd keeps them all, but for the lowest
    monkeypatch.setattr(Structure, "reruns", False)
    assert_same(loki.attribute(model, PROMPTS, **options), got)
    assert alive["most"] > 7 * 0.5 * layer
    assert alive["now"] == 0


def test_a_batch_reads_the_head_for_its_logits_and_for_its_points(tmp_path, monkeypatch):
    """It is 1 GB of an 8B model; that the model was checked is known without."""
    read, names = OffloadedWeightsLoader.__getitem__, []

    def noting(self, name):
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", noting)
    model = offloaded(build_model(device="cpu"), tmp_path)
    loki.attribute(model, PROMPTS[:1])  # an engine is chosen
    times = []
    for count in (1, 2):
        names.clear()
        loki.attribute(model, PROMPTS[:count], batch_size=1)
        times.append(names.count("lm_head.weight"))
    assert times[1] - times[0] == 2
