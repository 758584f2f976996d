"""Adapters of bases in another dtype, and what a layer keeps and calls."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import loki_kernels as loki
from loki_kernels.peft import LokiConfig
from tests.models import build_model, to_device
from tests.tiny_training import ROWS, load_model, logits, token_batch, train

SORTED = [sorted(rows) for rows in ROWS]


def test_an_adapter_of_another_class_is_refused(checkpoint, tmp_path):
    """Of names that it does not find PEFT says no more than a warning, and acts as the base."""
    model = peft.get_peft_model(load_model(checkpoint), LokiConfig(rows=ROWS))
    train(model).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {
        name.replace("model.model.layers", "model.model.language_model.layers"): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"language_model\.layers.* which this model lacks"):
        peft.PeftModel.from_pretrained(load_model(checkpoint), tmp_path / "adapter")


@pytest.mark.parametrize("copied", [False, True])
def test_other_rows_are_refused_without_a_peft_model(copied):
    """As transformers' ``add_adapter`` leaves a model; of as many rows, so every shape fits."""
    model = build_model()
    peft.inject_adapter_in_model(LokiConfig(rows=ROWS), model)
    model = copy.deepcopy(model) if copied else model
    other = peft.inject_adapter_in_model(LokiConfig(rows=[[1, 5, 41], [0], [7, 3]]), build_model())
    saved = peft.get_peft_model_state_dict(other)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="trains other rows in adapter 'default'"):
        peft.set_peft_model_state_dict(model, saved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_unloaded_base_has_no_hooks_of_ours():
    base = build_model()
    for _ in range(2):  # of which the second replaces the first
        model = peft.get_peft_model(base, LokiConfig(rows=ROWS))
    assert len(base._load_state_dict_pre_hooks) == 1
    model.unload()
    assert not base._load_state_dict_pre_hooks


def test_layers_that_are_checkpointed_are_of_this_class(checkpoint, tmp_path):
    """As accelerate wraps them under FSDP2; state dicts have plain names."""
    model = peft.get_peft_model(load_model(checkpoint), LokiConfig(rows=ROWS))
    layers = model.get_base_model().model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    saved = {name: tensor.clone() for name, tensor in train(model).state_dict().items()}
    train(model)
    model.load_state_dict(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    name = next(name for name in saved if ".loki_index" in name)
    with pytest.raises(ValueError, match="trains other rows"):
        model.load_state_dict(saved | {name: saved[name] + 1})


def test_a_base_weight_that_is_to_be_trained_has_its_gradient(checkpoint):
    model = peft.get_peft_model(load_model(checkpoint).float(), LokiConfig(rows=ROWS))
    model.requires_grad_(True)
    model(input_ids=token_batch(), labels=token_batch()).loss.backward()
    for layer in down_projs(model):
        assert layer.base_layer.weight.grad.abs().sum() > 0


@pytest.fixture
def checkpoint(tmp_path):
    build_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def down_projs(model):
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [layer.mlp.down_proj for layer in model.model.layers]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_update_fits_a_base_of_another_dtype(checkpoint, tmp_path, dtype):
    model = peft.get_peft_model(load_model(checkpoint, dtype=torch.bfloat16), LokiConfig(rows=ROWS))
    train(model, lr=0.01).save_pretrained(tmp_path / "adapter")
    for way in (peft.PeftModel.from_pretrained, loki.load_adapter):
        other = load_model(checkpoint, dtype=dtype)
        rows = down_projs(other)[0].weight[SORTED[0]].detach().clone()
        loaded = way(other, str(tmp_path / "adapter"))
        merged = (
            loaded.merge_and_unload() if hasattr(loaded, "merge_and_unload") else loaded.merge()
        )
        update = down_projs(model)[0].loki_update["default"].detach()
        want = (rows.double() + update.double()).to(dtype)
        assert torch.equal(down_projs(merged)[0].weight[SORTED[0]], want)


def test_another_model_of_another_dtype_is_refused(tmp_path):
    model = peft.get_peft_model(build_model(dtype=torch.bfloat16), LokiConfig(rows=ROWS))
    model.save_pretrained(tmp_path)
    other = build_model(seed=1)
    with pytest.raises(ValueError, match="another base"):
        peft.PeftModel.from_pretrained(other, str(tmp_path))
    assert all(type(layer) is torch.nn.Linear for layer in down_projs(other))


@pytest.mark.parametrize(("rank", "lr"), [(None, 2e-4), (2, 1e-3)])
def test_merged_rows_are_no_copy_of_the_base(rank, lr, tmp_path):
    """An update of .5 to .7 %, nearer to the base than copies of other dtypes may be."""
    config = LokiConfig(rows=[list(range(40))] * 3, rank=rank)
    model = train(peft.get_peft_model(build_model(), config), lr=lr)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    for dtype, said in ((torch.float16, "hold it already"), (torch.bfloat16, "have other values")):
        with pytest.raises(ValueError, match=said):
            peft.PeftModel.from_pretrained(copy.deepcopy(merged).to(dtype), str(tmp_path))
    peft.PeftModel.from_pretrained(build_model(dtype=torch.bfloat16), str(tmp_path))


def test_decay_pulls_to_the_base():
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
    train(model, steps=1)
    update = down_projs(model)[0].loki_update["default"]
    before = update.detach().clone()
    optimizer = torch.optim.SGD([update], lr=0.1, weight_decay=1.0)
    update.grad = torch.zeros_like(update)
    optimizer.step()
    torch.testing.assert_close(update.detach(), 0.9 * before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_second_copy_of_the_rows_is_kept(dtype):
    model = peft.get_peft_model(build_model(dtype=dtype), LokiConfig(rows=ROWS))
    layer = down_projs(model)[0]
    assert [name for name, _ in layer.named_buffers()] == ["loki_index.default"]
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    x = to_device(torch.randn(7, layer.in_features, dtype=dtype))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum().backward()
    update = layer.loki_update["default"]
    rows = [t for t in saved if t.shape == update.shape]
    assert {t.untyped_storage().data_ptr() for t in rows} == {update.data_ptr()}
    assert math.prod(update.grad.shape) == update.numel()


@pytest.mark.parametrize("kind", ["hook", "forward"])
def test_hooks_of_the_base_are_called(kind):
    model = build_model()
    linear = down_projs(model)[0]
    calls = []
    if kind == "hook":
        linear.register_forward_hook(lambda module, inputs, output: calls.append(output))
    else:  # as accelerate's hooks are
        plain = linear.forward
        linear.forward = lambda x: calls.append(x) or plain(x)
    wrapped = peft.get_peft_model(model, LokiConfig(rows=ROWS))
    twin = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
    for trained in (wrapped, twin):
        train(trained)
    assert len(calls) == 3
    torch.testing.assert_close(logits(wrapped), logits(twin), atol=1e-4, rtol=1e-4)


def test_lora_on_a_patched_model_says_so_before_training():
    model = build_model()
    loki.patch(model, ROWS)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    wrapped, batch = lora(model, config), token_batch()
    with pytest.raises(
        RuntimeError, match=r"the rows of this patched model are frozen.*Patch last"
    ):
        wrapped.train()(input_ids=batch, labels=batch)
    wrapped.eval()(input_ids=batch)
    with torch.no_grad():
        wrapped.train()(input_ids=batch)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], None])
def test_patch_refuses_a_model_with_an_adapter(targets):
    """Patching would freeze it, LoRA's or our own."""
    config = LokiConfig(rows=ROWS)
    if targets is not None:
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=2)
    model = lora(build_model(), config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    with pytest.raises(ValueError, match="has a PEFT adapter"):
        loki.patch(model, ROWS)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def lora(model, config):
    try:
        return peft.get_peft_model(model, config)
    except ImportError as error:  # peft 0.18 beside a new torchao
        pytest.skip(str(error))
