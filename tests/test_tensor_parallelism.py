"""Models that another program has split by tensor parallelism are refused for what they are."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import loki_kernels as loki
from loki_kernels.peft import LokiConfig
from tests.models import build_model

ROWS = [[1], [2], [3]]
PROMPT = [{"input_ids": [1, 2, 3]}]


def split(linear, mesh, dimension):
    weight = distribute_tensor(linear.weight.detach(), mesh, [Shard(dimension)])
    linear.weight = nn.Parameter(weight)
    assert isinstance(linear.weight, DTensor)


def refused(model, message):
    for attempt in (
        lambda: loki.patch(model, ROWS),
        lambda: peft.get_peft_model(model, LokiConfig(rows=ROWS)),
        lambda: loki.attribute(model, PROMPT),
        lambda: loki.estimate_protection(model, [[1, 2, 3, 4], [5, 6, 7]]),
    ):
        with pytest.raises(loki.UnsupportedModelError, match=message):
            attempt()


@pytest.mark.parametrize(("name", "dimension"), [(None, 1), (None, -1), ("tp", 1), ("tp", 0)])
def test_a_split_down_projection(one_process, name, dimension):
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=name and (name,))
    model = build_model(device="cpu")
    for layer in model.model.layers:
        split(layer.mlp.down_proj, mesh, dimension)
    refused(model, r"split by tensor parallelism .* patch does not support")


def test_smaller_plain_weights(one_process):
    """As transformers' earlier versions leave them: the model knows how many parts there are."""
    model = build_model(device="cpu")
    model._tp_size = 2
    refused(model, "without tp_plan")
    model._tp_size = 1
    loki.patch(model, ROWS).unpatch()


@pytest.mark.parametrize("dimension", [0, 1])
def test_fully_shard_is_something_else(one_process, dimension):
    model = build_model(device="cpu")
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(min(dimension, p.ndim - 1)))
    with pytest.raises(loki.UnsupportedModelError, match="before fully_shard"):
        loki.patch(model, ROWS)
    want = loki.attribute(build_model(device="cpu"), PROMPT)
    assert torch.equal(loki.attribute(model, PROMPT).scores, want.scores)


def test_tp_plan_of_transformers(one_process, tmp_path, monkeypatch):
    """What from_pretrained(tp_plan="auto") gives in one process is a model, whole or refused."""
    transformers = pytest.importorskip("transformers")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    build_model(device="cpu").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, tp_plan="auto")
    if isinstance(model.model.layers[0].mlp.down_proj.weight, DTensor):
        refused(model, "tensor parallelism")
    else:
        with torch.no_grad():
            loki.patch(model, ROWS).unpatch()
