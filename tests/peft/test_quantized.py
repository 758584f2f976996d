"""Rows over a quantized base, with PEFT: torchao and bitsandbytes, as far as they run here."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.core_model_loading import WeightRenaming

import loki_kernels as loki
import loki_kernels.peft
from loki_kernels.attribution import analysis
from loki_kernels.cli import main
from loki_kernels.peft import LokiConfig
from tests.models import DEVICE, GQA, _config, build_model
from tests.tiny_training import ROWS, WordTokenizer, logits, train

quantization_utils = pytest.importorskip("peft.utils.quantization_utils", reason="needs peft 0.20")
torchao = pytest.importorskip("torchao.quantization")
pytest.importorskip("bitsandbytes")

# a quantized model cannot be moved
PLACEMENT = {} if DEVICE.type == "cpu" else {"device_map": {"": DEVICE}}
QUANTIZATIONS = {
    "torchao int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao int8 dynamic": lambda: TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig()),
    # of torchao's int4 kinds, the one that a CPU can compute with
    "torchao int4": lambda: TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
}

# How far requantized rows may lie from the trained ones, as a part of the update, and the logits of
# an update over the quantized base from those over the full one; without the update the logits are
# 0.28, 0.52 (int4) and 0.43 (nf4) apart.
INT8 = (0.03, 0.1)
TOLERANCES = {"torchao int4": (0.6, 0.5), "bitsandbytes nf4": (0.4, 0.4)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """bfloat16, of sizes that every kernel takes."""
    folder = tmp_path_factory.mktemp("base")
    sizes = GQA | {"hidden_size": 128, "intermediate_size": 256}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(transformers.LlamaConfig, **sizes))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(params=QUANTIZATIONS)
def base(request, checkpoint):
    def load():
        return load_quantized(checkpoint, QUANTIZATIONS[request.param]())

    return load


@pytest.fixture
def tolerances(request, base):
    """(of requantized rows, of the logits of another base's update)."""
    return TOLERANCES.get(request.node.callspec.params["base"], INT8)


def load_quantized(checkpoint, config):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=config, dtype=torch.bfloat16, **PLACEMENT
    )


def down_proj(model):
    return model.get_base_model().model.layers[0].mlp.down_proj


def distance(a, b):
    return float((a - b).float().norm() / b.float().norm())


def test_starts_as_the_base_and_learns(base, tmp_path):
    want = logits(base())
    model = peft.get_peft_model(base(), LokiConfig(rows=ROWS))
    assert torch.equal(logits(model), want)
    assert down_proj(model).loki_update["default"].dtype == torch.float32
    learned = logits(train(model, lr=0.02))
    assert distance(learned, want) > 0.1
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    assert torch.equal(logits(again), learned)


def test_analyses_by_itself(base, tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(analysis, "find_tokenizer", lambda model: WordTokenizer())
    try:
        model = peft.get_peft_model(base(), LokiConfig(quota=5))
    except loki.UnsupportedModelError as error:  # the analysis is a forward pass
        if "bitsandbytes repacks 4-bit weights on this CPU" not in str(error):
            raise
        pytest.skip(str(error))
    assert len(list(tmp_path.iterdir())) == 1
    again = peft.get_peft_model(base(), LokiConfig(quota=5))
    assert len(list(tmp_path.iterdir())) == 1
    assert again.peft_config["default"].rows == model.peft_config["default"].rows


def test_low_rank_rows(base):
    want = logits(base())
    model = peft.get_peft_model(base(), LokiConfig(rows=ROWS, rank=2))
    assert torch.equal(logits(model), want)
    assert distance(logits(train(model, lr=0.02)), want) > 0.01


@pytest.mark.parametrize("how", ["dequantize", "requantize"])
def test_merging_says_how(base, how, tmp_path):
    model = peft.get_peft_model(base(), LokiConfig(rows=ROWS))
    learned = logits(train(model, lr=0.02))
    with pytest.raises(ValueError, match="say how to merge"):
        model.merge_adapter()
    assert torch.equal(logits(model), learned)
    kind = type(down_proj(model).base_layer.weight)
    model.peft_config["default"].quantized_merge = how
    model.merge_adapter()
    assert distance(logits(model), learned) < 0.1
    model.unmerge_adapter()
    assert type(down_proj(model).base_layer.weight) is kind
    assert torch.equal(logits(model), learned)

    merged = model.merge_and_unload()
    assert distance(logits(merged), learned) < 0.1
    plain = how == "dequantize"
    types = {type(layer.mlp.down_proj.weight.data) for layer in merged.model.layers}
    assert (types == {torch.Tensor}) == (plain or "Params" in kind.__name__)
    assert hasattr(merged.config, "quantization_config") != plain
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **PLACEMENT)
    assert distance(logits(again), logits(merged)) < 0.02


@pytest.mark.parametrize("name", ["torchao int8", "bitsandbytes int8", "bitsandbytes nf4"])
def test_a_checkpoint_that_is_quantized_on_disk_is_merged_and_saved(name, checkpoint, tmp_path):
    """transformers reads it by conversions that it cannot undo."""
    load_quantized(checkpoint, QUANTIZATIONS[name]()).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **PLACEMENT)
    own = WeightRenaming("another_name", "a_name")  # as an architecture's are
    base._weight_conversions.append(own)
    model = peft.get_peft_model(base, LokiConfig(rows=ROWS, quantized_merge="dequantize"))
    merged = train(model, lr=0.02).merge_and_unload()
    assert merged._weight_conversions == [own]
    assert not any(hasattr(merged, f"is_loaded_in_{bits}bit") for bits in (4, 8))
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").to(DEVICE)
    assert torch.equal(logits(again), logits(merged))


def test_requantized_rows_are_close_to_the_trained_ones(base, tolerances):
    model = peft.get_peft_model(base(), LokiConfig(rows=ROWS, quantized_merge="requantize"))
    layer = down_proj(model)
    rows = torch.tensor([1, 5, 40])
    start = layer.base_rows(rows).float()  # before a forward pass, which can repack them
    train(model, lr=0.02)
    update = layer.loki_update["default"].detach()
    model.merge_adapter()
    got = layer.base_rows(rows).float()
    assert (got - start - update).norm() < tolerances[0] * update.norm()


@pytest.mark.parametrize("way", ["peft", "load_adapter", "merge"])
def test_merges_into_the_full_base(base, checkpoint, tmp_path, way):
    model = train(peft.get_peft_model(base(), LokiConfig(rows=ROWS)), lr=0.02)
    model.save_pretrained(tmp_path / "adapter")
    update = down_proj(model).loki_update["default"].cpu()
    full = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    rows = full.model.layers[0].mlp.down_proj.weight[[1, 5, 40]].detach().clone()
    folder = str(tmp_path / "adapter")
    if way == "peft":
        merged = peft.PeftModel.from_pretrained(full, folder).merge_and_unload()
    elif way == "load_adapter":
        merged = loki.load_adapter(full, folder).merge()
    else:
        main(["merge", str(checkpoint), folder, str(tmp_path / "merged")])
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    got = merged.model.layers[0].mlp.down_proj.weight[[1, 5, 40]]
    assert torch.equal(got, (rows.double() + update.double()).to(rows.dtype))


def test_an_update_of_the_full_base_is_loaded_over_a_quantized_one(
    base, checkpoint, tmp_path, tolerances
):
    full = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    trained = train(peft.get_peft_model(full, LokiConfig(rows=ROWS)), lr=0.02)
    trained.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    update = down_proj(model).loki_update["default"].cpu()
    assert torch.equal(update, down_proj(trained).loki_update["default"])
    assert distance(logits(model), logits(trained)) < tolerances[1]
    config = model.peft_config["default"]
    assert config.base_dtype == "float32"  # what it was trained on


def test_another_model_is_refused(base, checkpoint, tmp_path):
    peft.get_peft_model(base(), LokiConfig(rows=ROWS)).save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with pytest.raises(ValueError, match="another base"):
        peft.PeftModel.from_pretrained(other, str(tmp_path))
    with pytest.raises(ValueError, match="another base"):
        loki.load_adapter(other, tmp_path)


def test_repacked_weights_are_refused_or_read_another_way(checkpoint):
    """4-bit weights on a CPU with AVX512-BF16, after a forward pass in evaluation."""
    config = QUANTIZATIONS["bitsandbytes nf4"]()
    model = load_quantized(checkpoint, config)
    want = logits(model)
    layer = model.model.layers[0].mlp.down_proj
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes does not repack weights on this CPU")
    with pytest.raises(loki.UnsupportedModelError, match="before that"):
        peft.get_peft_model(model, LokiConfig(rows=ROWS))
    model = peft.get_peft_model(
        load_quantized(checkpoint, config), LokiConfig(rows=ROWS, quantized_merge="dequantize")
    )
    assert torch.equal(logits(model), want)
    assert distance(logits(model.merge_and_unload()), want) < 0.02


class Packed(torch.nn.Linear):
    """A layer of GPTQ's, for all that PEFT says of one."""


@pytest.mark.parametrize("options", [{"rows": ROWS}, {"quota": 100, "protect": False}])
def test_a_base_whose_rows_cannot_be_read_is_refused(options, monkeypatch):
    model = build_model()
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = Packed
        del layer.mlp.down_proj.weight  # it has a qweight
    backend = quantization_utils.ForwardOnlyQuantizationBackend("gptq")
    monkeypatch.setattr(
        quantization_utils,
        "resolve_quantization_backend",
        lambda layer, **_: backend if isinstance(layer, Packed) else None,
    )
    with pytest.raises(loki.UnsupportedModelError, match=r"Packed \(gptq\) cannot be read"):
        peft.get_peft_model(model, LokiConfig(**options))


class Rounding(torch.nn.Linear):
    """As BitNet's AutoBitLinear, which rounds its weight in every pass."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.sign())


class Scaled(torch.nn.Linear):
    """As FP8Linear, which holds a scale beside what it multiplies with."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x)) * 0.5


class Alike(torch.nn.Linear):
    """A subclass that computes what a linear layer does, as many have been made."""


@pytest.mark.parametrize(("kind", "dtype"), [
    (Rounding, torch.float32), (Scaled, torch.float8_e4m3fn), (Scaled, torch.int8),
])  # fmt: skip
def test_what_peft_takes_for_plain_and_is_not_is_refused(kind, dtype, monkeypatch):
    """Before a protection is estimated; of a packed weight the directions would be zeros."""
    monkeypatch.setattr(
        loki_kernels.peft.model, "protection_to_keep", lambda *_: pytest.fail("it estimates")
    )
    model = build_model()
    for layer in model.model.layers:
        linear = layer.mlp.down_proj
        linear.__class__ = kind
        linear.weight = torch.nn.Parameter(linear.weight.data.to(dtype), requires_grad=False)
    with pytest.raises(loki.UnsupportedModelError, match=f"{kind.__name__} with a Parameter of "):
        peft.get_peft_model(model, LokiConfig())
    assert {type(layer.mlp.down_proj) for layer in model.model.layers} == {kind}


def test_a_subclass_that_computes_a_linear_layer_is_trained():
    model = build_model()
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = Alike
    twin = train(peft.get_peft_model(build_model(), LokiConfig(rows=ROWS)))
    trained = train(peft.get_peft_model(model, LokiConfig(rows=ROWS)))
    torch.testing.assert_close(logits(trained), logits(twin), atol=1e-4, rtol=1e-4)


def test_patch_names_the_way(base):
    with pytest.raises(loki.UnsupportedModelError, match="LokiConfig"):
        loki.patch(base(), ROWS)


def test_a_protected_update_leaves_the_directions_alone(base, checkpoint, tmp_path):
    full = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    texts = [[3 + (7 * i + j * j) % 90 for j in range(20)] for i in range(8)]
    protection = loki.estimate_protection(full, texts, share=0.999, max_directions=64)
    file = tmp_path / "protection.safetensors"
    protection.save(file)
    model = peft.get_peft_model(base(), LokiConfig(rows=ROWS, protect=str(file)))
    layer = down_proj(model)
    update = layer.loki_update["default"]
    update.data.normal_()
    directions = protection.directions["model.layers.0.mlp.down_proj"].to(update.device)
    assert directions.shape[1] == 64
    x = directions.T.bfloat16()
    with torch.no_grad():
        change = (layer(x) - layer.base_layer(x)).float()
        assert change.norm() < 0.05 * (x.float() @ update.T).norm()
        outside = torch.randn_like(x)
        assert (layer(outside) - layer.base_layer(outside)).float().norm() > 10
    want = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
    assert distance(logits(again), want) < 0.02
