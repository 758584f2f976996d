"""``patch(model, fuse_mlp=True)``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

import loki_kernels as loki
from loki_kernels.training.mlp import FusedMLP
from tests.models import ARCHITECTURES, assert_unchanged, build_model, snapshot, to_device
from tests.tiny_training import ROWS

ACTIVATIONS = dict.fromkeys(set(ARCHITECTURES) - {"gpt_neox"}, "silu") | {"gemma2": "gelu_tanh"}
IDS = to_device(torch.arange(18).view(2, 9))


def gradients(model):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def saved_elements(model):
    """What autograd keeps for one loss, parameters left out."""
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        if x.data_ptr() not in parameters:
            kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(input_ids=IDS, labels=IDS).loss
    total = sum(kept.values())
    loss.backward()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_fused_trains_like_unfused(name, dtype):
    plain, fused = build_model(name, dtype), build_model(name, dtype)
    before, keys = snapshot(fused), list(fused.state_dict())
    loki.patch(plain, ROWS)
    handle = loki.patch(fused, ROWS, fuse_mlp=True)
    report = handle.report
    assert list(report.fused.values()) == [ACTIVATIONS[name]] * 3
    assert "3 MLPs fused" in str(report)
    own = {f"{n}.{part}" for n, _ in handle.named_layers() for part in ("index", "update")}
    assert [key for key in fused.state_dict() if key not in own] == keys
    error = 1e-5 if dtype == torch.float32 else 0.05
    for got, want in zip(gradients(fused), gradients(plain), strict=True):
        assert float((got - want).norm()) <= error * float(want.norm())
    fused.zero_grad()
    handle.unpatch()
    assert_unchanged(fused, before)


def test_a_protected_update_fused_trains_like_unfused():
    plain, fused = build_model(), build_model()
    protection = loki.estimate_protection(build_model(), [range(60)] * 8)
    loki.patch(plain, ROWS, protect=protection)
    handle = loki.patch(fused, ROWS, fuse_mlp=True, protect=protection)
    assert len(handle.report.fused) == 3
    for got, want in zip(gradients(fused), gradients(plain), strict=True):
        assert float((got - want).norm()) <= 1e-5 * float(want.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_rounds_as_training_does(dtype):
    model = build_model(dtype=dtype)
    loki.patch(model, ROWS, fuse_mlp=True)
    trained = model(input_ids=IDS).logits
    assert trained.requires_grad
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, trained)


def test_the_product_is_not_kept():
    plain, fused = build_model(), build_model()
    loki.patch(plain, ROWS)
    loki.patch(fused, ROWS, fuse_mlp=True)
    product = IDS.numel() * fused.config.intermediate_size
    # Besides gate and up, an unfused MLP keeps silu(gate) and the product; in the first layer,
    # below which nothing is trained, both keep the product alone.
    assert saved_elements(plain) - saved_elements(fused) == 2 * 2 * product


def test_merge_and_train_flag():
    model = build_model()
    handle = loki.patch(model, ROWS, fuse_mlp=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    gradients(model)
    optimizer.step()
    want = model(input_ids=IDS).logits.detach()
    model.train()
    handle.merge()
    assert all(module.training for module in model.modules())
    assert not any(isinstance(m, (FusedMLP, loki.LokiLinear)) for m in model.modules())
    torch.testing.assert_close(model(input_ids=IDS).logits.detach(), want)


def test_a_copy_has_weights_of_its_own():
    model = build_model()
    loki.patch(model, ROWS, fuse_mlp=True)
    copied = copy.deepcopy(model)
    want = copied(input_ids=IDS).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(input_ids=IDS).logits, want)


def test_compiles_whole():
    torch._dynamo.reset()
    model = build_model()
    handle = loki.patch(model, ROWS, fuse_mlp=True)
    mlp = model.get_submodule(next(iter(handle.report.fused)))
    x = to_device(torch.randn(2, 5, 48)).requires_grad_()  # else the fused op does not run
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (mlp, compiled):
        run(x).square().sum().backward()
        grads.append(mlp.down_proj.update.grad.clone())
        mlp.zero_grad()
    torch.testing.assert_close(*grads)


def test_hooks_of_the_down_projection_run():
    model = build_model()
    loki.patch(model, ROWS, fuse_mlp=True)
    layer = model.model.layers[1].mlp.down_proj
    seen = []
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.register_full_backward_pre_hook(lambda *_: seen.append("before"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert sorted(seen) == ["backward", "before"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_the_activation_run(when):
    model = build_model()
    seen, activation = [], nn.SiLU()
    model.model.layers[1].mlp.act_fn = activation  # one of its own

    def watch():
        activation.register_forward_hook(lambda *_: seen.append("forward"))

    if when == "before":
        watch()
    want = gradients(copy.deepcopy(loki.patch(copy.deepcopy(model), ROWS).model))
    report = loki.patch(model, ROWS, fuse_mlp=True).report
    fused = {} if when == "after" else {"model.layers.1.mlp": "its activation has hooks"}
    assert report.not_fused == fused
    if when == "after":
        watch()
    seen.clear()
    got = gradients(model)
    assert seen == ["forward"]
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


def test_an_mlp_with_backward_hooks_is_left():
    model = build_model()
    seen = []
    model.model.layers[1].mlp.register_full_backward_hook(lambda *_: seen.append(1))
    report = loki.patch(model, ROWS, fuse_mlp=True).report
    assert report.not_fused == {"model.layers.1.mlp": "it has hooks"}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert seen == [1]


def change_mlp(model, index, **attributes):
    for name, value in attributes.items():
        setattr(model.model.layers[index].mlp, name, value)
    return model


class Scaled(nn.Module):
    """An MLP with a multiplier of its own."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.5)


class Dropping(Scaled):
    """An MLP whose dropout is a function and no module, as Seed-OSS's."""

    def forward(self, x):
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return nn.functional.dropout(y, 0.1, training=self.training)


def drop_in_mlp(model):
    model.model.layers[1].mlp = Dropping(model.model.layers[1].mlp).eval()
    return model


def scale_mlp(model):
    model.model.layers[1].mlp = Scaled(model.model.layers[1].mlp)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda m: change_mlp(m, 1, act_fn=nn.GELU()), "activation"),
        (lambda m: change_mlp(m, 1, act_fn=nn.ReLU()), "activation"),
        (lambda m: change_mlp(m, 1, norm=nn.LayerNorm(48)), "parameters besides"),
        (lambda m: change_mlp(m, 1, dropout=nn.Dropout(0.1)), "dropout"),
        (scale_mlp, "does not compute"),
        (drop_in_mlp, "training mode, as dropout"),
    ],
)
def test_what_cannot_be_fused_is_left_and_reported(make, reason):
    model = make(build_model())
    mlp, want = model.model.layers[1].mlp, model(input_ids=IDS).logits
    report = loki.patch(model, ROWS, fuse_mlp=True).report
    assert list(report.not_fused) == ["model.layers.1.mlp"]
    assert reason in report.not_fused["model.layers.1.mlp"]
    assert reason in str(report)
    assert len(report.fused) == 2
    assert model.model.layers[1].mlp is mlp
    torch.testing.assert_close(model.eval()(input_ids=IDS).logits, want)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_found_in_either_mode(training):
    """By a forward pass in training mode, after which everything draws what it would have drawn."""
    model = drop_in_mlp(build_model()).train(training)
    state = torch.get_rng_state()
    report = loki.patch(model, ROWS, fuse_mlp=True).report
    assert "dropout" in report.not_fused["model.layers.1.mlp"]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.model.layers[1].mlp.training is training


def test_ungated_and_low_rank_are_reported():
    neox = loki.patch(build_model("gpt_neox"), ROWS, fuse_mlp=True).report
    assert not neox.fused
    assert len(neox.not_fused) == 3
    config = BloomConfig(vocab_size=97, hidden_size=48, n_layer=3, n_head=4)
    bloom = loki.patch(BloomForCausalLM(config), ROWS, fuse_mlp=True).report
    assert len(bloom.not_fused) == 3  # its MLP takes the residual as a second argument
    low_rank = loki.patch(build_model(), ROWS, rank=2, fuse_mlp=True).report
    assert not low_rank.fused
    assert len(low_rank.not_fused) == 3
    assert all("low-rank" in why for why in low_rank.not_fused.values())
    assert not loki.patch(build_model(), ROWS).report.not_fused
