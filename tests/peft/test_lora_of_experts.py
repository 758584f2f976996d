"""LoRA exports of mixtures of experts, as plain PEFT reads them, its oldest version too."""

from __future__ import annotations

import copy
import functools
import json
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file

import loki_kernels as loki
from loki_kernels.training.experts import LokiExperts
from tests.models import DEVICE, assert_unchanged, snapshot
from tests.tiny_training import logits, train
from tests.zoo.build import build

# Experts of both layouts, also with a bias, beside shared ones, and after dense layers.
FAMILIES = ["Qwen3Moe", "Mixtral", "GptOss", "Llama4", "Glm4Moe", "DeepseekV3"]
ROWS = [[5, 1], [0], [7, 3, 30], []]


@pytest.fixture(autouse=True)
def without_torchao(monkeypatch):
    """Of any layer with a weight PEFT 0.18 asks for classes that torchao no longer has."""
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)


@functools.cache
def built(family):
    return build(f"{family}ForCausalLM", device=DEVICE)


def trained(family, rows=ROWS, rank=None, protect=None):
    model = copy.deepcopy(built(family))
    loki.patch(model, rows, rank=rank, protect=protect)
    return train(model)


def named_experts(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LokiExperts)]


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("family", "rank"), [*((family, None) for family in FAMILIES), ("Mixtral", 2), ("Glm4Moe", 2)]
)
def test_peft_gives_the_trained_logits(family, rank, tmp_path, caplog):
    model = trained(family, rank=rank)
    want = logits(model)
    loki.export_lora(model, tmp_path)
    written = sum(4 * tensor.numel() for tensor in tensors_of(tmp_path).values())
    assert f"takes {written / 1e9:.3g} GB" in caplog.text
    base = copy.deepcopy(built(family))
    assert (logits(base) - want).norm() > 1e-2 * want.norm()
    lora = peft.PeftModel.from_pretrained(base, str(tmp_path))
    for got in (logits(lora), logits(lora.merge_and_unload())):
        assert (got - want).norm() <= 1e-5 * want.norm()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_version"] == peft.__version__
    # no layer is filled up to the rank of another
    ranks = {len(rows) for rows in ROWS} - {0} if rank is None else {rank}
    assert {config["r"], *config["rank_pattern"].values()} == ranks


@pytest.mark.parametrize("rank", [None, 2])
def test_of_a_protected_update_what_acts_is_exported(rank, tmp_path):
    protection = loki.estimate_protection(
        copy.deepcopy(built("Mixtral")), [list(range(3, 60)), list(range(70, 5, -1))], share=0.7
    )
    want = logits(model := trained("Mixtral", rank=rank, protect=protection))
    loki.export_lora(model, tmp_path)
    lora = peft.PeftModel.from_pretrained(copy.deepcopy(built("Mixtral")), str(tmp_path))
    got = logits(lora.merge_and_unload())
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_a_smaller_rank_is_the_best_of_every_expert(tmp_path, caplog):
    model = trained("Mixtral")
    loki.export_lora(model, tmp_path, max_rank=2)
    assert "but for a relative error" in caplog.text
    base = copy.deepcopy(built("Mixtral"))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(base, str(tmp_path)).merge_and_unload().state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, LokiExperts):
            got = merged[f"{name}.down_proj"] - before[f"{name}.down_proj"]
            want = layer.put_rows(torch.zeros_like(got), layer.update.detach())
            lost = (got - want).square().sum((1, 2))
            least = torch.linalg.svdvals(want)[:, 2:].square().sum(1)
            torch.testing.assert_close(lost, least, atol=1e-7, rtol=1e-3)


def test_without_peft_nothing_is_written(tmp_path, monkeypatch):
    model = trained("Mixtral")
    before = snapshot(model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"loki-kernels\[peft\]"):
        loki.export_lora(model, tmp_path)
    assert_unchanged(model, before)
    assert not list(tmp_path.iterdir())


def test_all_rows_of_narrow_experts_have_the_rank_of_their_width(tmp_path):
    """An expert's update is [32, 24]: of rank 24, not 32."""
    every = [list(range(32))] * 4
    want = logits(model := trained("Qwen3Moe", rows=every))
    widths = {layer.base_rows.shape[-1] for _, layer in named_experts(model)}
    assert widths == {24}
    loki.export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == widths
    lora = peft.PeftModel.from_pretrained(copy.deepcopy(built("Qwen3Moe")), str(tmp_path))
    got = logits(lora.merge_and_unload())
    assert (got - want).norm() <= 1e-5 * want.norm()
