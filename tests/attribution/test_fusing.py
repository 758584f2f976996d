"""What an analysis runs in place of a model's RMS norms and gated products."""

from __future__ import annotations

import contextlib
import copy
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import loki_kernels as loki
from loki_kernels.attribution import fusing, job
from loki_kernels.attribution.fusing import find_fusion
from loki_kernels.attribution.plan import BatchLimits, windows
from loki_kernels.attribution.prompts import Tokens
from loki_kernels.attribution.steering import borrowed, replacing
from loki_kernels.discovery import find_structure
from tests.architectures import deepseek, gpt2, granite_moe_hybrid, lfm2
from tests.attribution.compiled import check_compiled
from tests.models import ARCHITECTURES, assert_unchanged, build_model, snapshot, to_device

# Norms and gated MLPs of each; LayerNorms and MLPs without a gate stay as they are.
REPLACED = {
    "llama": (7, 3),
    "llama_mlp_bias": (7, 3),
    "qwen2": (7, 3),
    "qwen3": (13, 3),  # queries and keys have norms
    "mistral": (7, 3),
    "gemma2": (13, 3),  # 1 + weight, tanh-approximated GELU
    "phi3": (7, 3),  # gate and up in one linear
    "olmo2": (13, 3),
    "gpt_neox": (0, 0),
    "granite": (7, 3),
    "cohere": (0, 3),
}


@pytest.fixture
def everywhere(monkeypatch):
    """Gated products too, which a CPU has no kernel for and small models no use."""
    monkeypatch.setattr(fusing, "_pays", lambda *_: True)


@pytest.fixture
def nowhere(monkeypatch):
    """What turns it off, when it is called."""
    return lambda: monkeypatch.setattr(job, "find_fusion", lambda *_: {})


def fused(structure, tokens):
    """A borrowed model while it is analysed."""
    prompt = torch.arange(3, 9, device=structure.device)[None]
    return replacing(find_fusion(structure, tokens, prompt))


def own_attributes(model):
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def replaced(model, tokens=1):
    """(norms, MLPs) whose forward is not their class's inside of `fused`."""
    structure = find_structure(model)
    with borrowed(structure), fused(structure, tokens):
        found = [m for m in model.modules() if "forward" in vars(m)]
    norms = sum(not list(m.children()) for m in found)
    return norms, len(found) - norms


def errors(got, want):
    got, want = got.scores.cpu().double(), want.scores.cpu().double()
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_replaced(name, dtype, everywhere):
    model = build_model(name, dtype)
    before = own_attributes(model)
    assert replaced(model) == REPLACED[name]
    assert own_attributes(model) == before


@pytest.mark.parametrize(("build", "count"), [
    (deepseek, (13, 3)),  # of the experts, the shared ones
    (lfm2, (11, 0)),  # its activation is no module
    (granite_moe_hybrid, (7, 3)),  # its mixer's norm is gated
    (gpt2, (0, 0)),
])  # fmt: skip
def test_what_is_replaced_in_other_kinds(build, count, everywhere):
    assert replaced(build()) == count


@pytest.mark.parametrize("definition", ["published", "captum"])
@pytest.mark.parametrize("site", ["down_proj", "ffn_neurons"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "olmo2", "gpt_neox"])
def test_scores_are_the_same(name, site, definition, prompts, everywhere, nowhere):
    model = build_model(name)
    before, own = snapshot(model), own_attributes(model)
    options = {"definition": definition, "site": site}
    got = loki.attribute(model, prompts, **options)
    assert_unchanged(model, before)
    assert own_attributes(model) == own
    nowhere()
    want = loki.attribute(model, prompts, **options)
    assert torch.equal(got.targets, want.targets)
    assert errors(got, want).max() <= 1e-5


@pytest.mark.parametrize("engine", ["decode", "reforward"])
def test_other_engines_too(engine, model, prompts, everywhere, nowhere):
    got = loki.attribute(model, prompts, engine=engine)
    nowhere()
    assert errors(got, loki.attribute(model, prompts, engine=engine)).max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_half_precision_is_as_near_to_float32(name, dtype, prompts, everywhere, nowhere):
    """Within twice the error of the model's own modules, in the same dtype and on its tokens."""
    exact_model = build_model(name)
    half = copy.deepcopy(exact_model).to(dtype)
    got = loki.attribute(half, prompts)
    nowhere()
    plain = loki.attribute(half, prompts, target=got.targets)
    exact = loki.attribute(exact_model, prompts, target=got.targets)
    assert not torch.equal(got.scores, plain.scores)
    ours, theirs = ((x.scores - exact.scores).norm() for x in (got, plain))
    assert ours <= 2 * theirs + 1e-6


def test_float64_stays_what_it_is(prompts, everywhere):
    assert replaced(build_model(dtype=torch.float64)) == (0, 0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_gradient_flows(name, everywhere):
    model = build_model(name)
    structure = find_structure(model)
    x = to_device(torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)))
    layer = structure.layers[1]
    for module in (layer.input_layernorm, layer.mlp):
        results = []
        with borrowed(structure), torch.enable_grad():
            for tokens in (None, 1):
                given = x.clone().requires_grad_()
                with fused(structure, tokens) if tokens else contextlib.nullcontext():
                    assert ("forward" in vars(module)) == bool(tokens)
                    y = module(given)
                results.append((y, *torch.autograd.grad(y.square().sum(), given)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


def test_undone_after_an_exception(model, prompts, everywhere):
    before, own = snapshot(model), own_attributes(model)
    structure = find_structure(model)
    with borrowed(structure), pytest.raises(KeyboardInterrupt), fused(structure, 1):
        raise KeyboardInterrupt
    assert_unchanged(model, before)
    assert own_attributes(model) == own


def test_modules_with_hooks_stay(model, prompts, everywhere):
    want = loki.attribute(model, prompts)
    layers, seen = model.model.layers, []

    def see(module, *_):
        seen.append(module)

    layers[0].mlp.act_fn.register_forward_hook(see)
    layers[1].input_layernorm.register_forward_hook(see)
    layers[2].mlp.gate_proj.register_forward_pre_hook(see)
    own = layers[2].input_layernorm
    own.forward = type(own).forward.__get__(own)
    assert replaced(model) == (6, 1)  # of the norms, that forward counts but is not replaced
    assert "forward" in vars(own)
    got = loki.attribute(model, prompts)
    assert errors(got, want).max() <= 1e-5
    assert len(set(seen)) == 3


def test_a_patched_model(model, prompts, everywhere):
    """`FusedMLP` has the op in place, and its rows are trained."""
    want = loki.attribute(model, prompts)
    for fuse_mlp, mlps in ((True, 0), (False, 3)):
        with loki.patch(model, [[1, 5], [0], [3]], fuse_mlp=fuse_mlp):
            assert replaced(model) == (7, mlps)
            assert errors(loki.attribute(model, prompts), want).max() <= 1e-5


def test_a_peft_model(model, prompts, everywhere, nowhere):
    import peft

    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, r=2)
    wrapped = peft.get_peft_model(model, config)
    assert replaced(wrapped) == (7, 3)
    got = loki.attribute(wrapped, prompts)
    nowhere()
    assert errors(got, loki.attribute(wrapped, prompts)).max() <= 1e-5


class Norm(nn.Module):
    """An RMS norm with one thing about it another."""

    def __init__(self, variant=""):
        super().__init__()
        self.variant = variant
        self.weight = nn.Parameter(torch.rand(48) + 0.5)
        self.eps, self.other = 1e-5, 0.1
        if variant == "bias":
            self.bias = nn.Parameter(torch.ones(48))

    def forward(self, hidden):
        x = hidden.float()
        if self.variant == "mean":
            x = x - x.mean(-1, keepdim=True)
        eps = {"no eps": 0, "another eps": 3e-5, "the other eps": self.other}.get(
            self.variant, self.eps
        )
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * self.weight
        return x if self.variant == "wide" else x.to(hidden.dtype)


class Gated(Norm):
    def forward(self, hidden, gate=None):
        y = super().forward(hidden)
        return y if gate is None else y * gate


@pytest.mark.parametrize(("norm", "count"), [
    (Norm(), 7),
    (Norm("the other eps"), 7),
    (Norm("no eps"), 6),
    (Norm("another eps"), 6),
    (Norm("mean"), 6),
    (Norm("bias"), 6),
    (Norm("wide").bfloat16(), 6),
    (Gated(), 6),
    (nn.RMSNorm(48), 6),
    (nn.LayerNorm(48), 6),
], ids=lambda x: getattr(x, "variant", "") or type(x).__name__)  # fmt: skip
def test_norms_are_known_by_what_they_compute(norm, count, model):
    model.model.norm = norm.to(model.device)
    assert replaced(model)[0] == count


def test_another_dtype_than_the_weights_takes_the_modules_own(model):
    structure = find_structure(model)
    x = to_device(torch.randn(3, 48)).bfloat16()
    want = model.model.norm(x)
    with borrowed(structure), fused(structure, 1):
        got = model.model.norm(hidden_states=x)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def test_one_of_a_kind_is_tried(model, monkeypatch):
    tried = []
    find = fusing._find_norm
    monkeypatch.setattr(fusing, "_find_norm", lambda m: (tried.append(m), find(m))[1])
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-3
    assert replaced(model)[0] == 7
    assert len(tried) == 2


def test_weights_that_come_and_go_are_left(model, monkeypatch):
    monkeypatch.setattr(fusing.Structure, "reruns", True)
    assert replaced(model) == (0, 0)


def test_products_are_fused_in_large_batches_on_a_kernel(model, monkeypatch):
    enough = fusing._HIDES_THE_HOST // (48 * 112) + 1
    monkeypatch.setattr(fusing, "has_kernel", lambda *_: False)
    assert replaced(model, enough) == (7, 0)
    monkeypatch.setattr(fusing, "has_kernel", lambda *_: True)
    assert replaced(model, enough) == (7, 3)
    assert replaced(model, enough - 1) == (7, 0)


def test_tokens_at_once():
    (window,) = windows([Tokens(np.ones(20, dtype=np.int64))] * 4, None)
    (planned,) = window.batches(0, BatchLimits(4, 1000, 1000), 21)
    assert planned.tokens_at_once(21, alone=False) == 4 * 20
    assert planned.tokens_at_once(100, alone=False) == 4 * 50
    assert planned.tokens_at_once(100, alone=True) == 50


def test_the_points_run_what_the_prompt_ran(model, prompts, monkeypatch, everywhere):
    """One decision for the whole analysis; it begins after the engines have been tried."""
    entered, was = [], job.find_fusion

    def find(structure, tokens, prompt):
        entered.append((tokens, *prompt.shape))
        return was(structure, tokens, prompt)

    monkeypatch.setattr(job, "find_fusion", find)
    loki.attribute(model, prompts, batch_size=1)
    assert entered == [(13, 1, 16)]


def test_compiles_whole(everywhere):
    check_compiled(build_model("gemma2"), 3, lambda structure: fused(structure, 1))


class Clamped(nn.Module):
    """A gated MLP whose gate stays below a limit, as some mixtures' do."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x):
        gate = self.gate_proj(x).clamp(max=10)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_clamped_gate_shows_in_large_rows(dtype, everywhere):
    model = build_model(dtype=dtype)
    mlp = model.model.layers[1].mlp
    model.model.layers[1].mlp = Clamped(mlp)
    assert replaced(model) == (7, 2)


def test_zeros_tell_nothing(model, everywhere):
    """New blocks start with zeros in their down-projections, where any formula gives the same."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
        model.model.layers[0].mlp.up_proj.weight.zero_()
    assert replaced(model) == (7, 0)  # the first one is tried for all


class Multiplied(Norm):
    """An RMS norm that multiplies before it divides: with zeros as weight it is ordinary."""

    def forward(self, hidden):
        x = hidden.float() * (1 + self.weight)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x.to(hidden.dtype)


def test_a_norm_is_tried_with_any_weight(model):
    norm = Multiplied()
    nn.init.zeros_(norm.weight)
    model.model.norm = norm.to(model.device)
    assert replaced(model) == (6, 0)


def test_a_norm_of_groups_takes_its_own(model):
    norm = model.model.norm
    structure = find_structure(model)
    x = to_device(torch.randn(3, 24))
    norm.weight = nn.Parameter(torch.ones(1, device=model.device))
    want = norm(x)
    with borrowed(structure), fused(structure, 1):
        assert torch.equal(norm(x), want)


def test_other_logits_undo_it(model, prompts, monkeypatch, caplog):
    """Modules that fool the trials show in the model's logits."""
    want = loki.attribute(model, prompts)
    monkeypatch.setattr(fusing, "_norms", lambda s: {m: m.weight.mul for m in norms(s)})
    monkeypatch.setattr(fusing, "_reasons", weakref.WeakKeyDictionary())
    with caplog.at_level("WARNING"):
        got = loki.attribute(model, prompts)
    assert "its own norms and activations: one kernel each gives other logits" in caplog.text
    assert errors(got, want).max() <= 1e-5


def test_a_quantized_part_that_comes_first_says_nothing_of_the_dtype(model, prompts):
    """bitsandbytes makes a vision tower's weights int8."""
    first = nn.Parameter(torch.zeros(1, dtype=torch.int8, device=model.device), requires_grad=False)
    model.register_parameter("first", first)
    with borrowed(structure := find_structure(model)):
        assert find_fusion(structure, 1, to_device(torch.arange(3, 9)[None]))
    assert loki.attribute(model, prompts).run["dtype"] == "float32"


@pytest.mark.parametrize(
    ("error", "kept"), [(torch.OutOfMemoryError("CUDA out of memory"), 0), (TypeError("alone"), 1)]
)
def test_what_cannot_be_tried_is_not_run(model, monkeypatch, caplog, error, kept):
    """Nothing is said of logits that nobody has seen; full memory is no lasting reason."""
    structure = find_structure(model)
    monkeypatch.setattr(fusing, "_reasons", weakref.WeakKeyDictionary())
    monkeypatch.setattr(type(structure), "run", mock.Mock(side_effect=error))
    with borrowed(structure), caplog.at_level("WARNING"):
        assert find_fusion(structure, 1, torch.arange(3, 9)[None]) == {}
    assert f"could not be tried ({error})" in caplog.text
    assert "other logits" not in caplog.text
    assert len(fusing._reasons[model]) == kept


def norms(structure):
    return [layer.input_layernorm for layer in structure.layers]


def test_quantized_linears_without_a_weight_stay(model, monkeypatch):
    monkeypatch.setattr(fusing, "_HIDES_THE_HOST", 0)
    monkeypatch.setattr(fusing, "has_kernel", lambda *_: True)
    structure = find_structure(model)
    down = model.model.layers[0].mlp.down_proj
    down.qweight = down._parameters.pop("weight")
    assert len(fusing._products(structure, 1)) == 2


def test_a_forward_that_was_put_there_since_stays(model):
    structure = find_structure(model)
    with borrowed(structure):
        forwards = find_fusion(structure, 1, to_device(torch.arange(3, 9)[None]))
        with replacing(forwards):
            model.model.norm.forward = other = lambda x: x
        assert vars(model.model.norm)["forward"] is other
        assert "forward" not in vars(model.model.layers[0].input_layernorm)


def test_a_forward_that_was_there_before_is_put_back():
    """As accelerate's is, where weights are offloaded."""
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    module.forward = own = lambda x: x
    with replacing({module: lambda x: 2 * x, other: lambda x: 3 * x}):
        assert (module(1), other(1)) == (2, 3)
    assert vars(module)["forward"] is own
    assert "forward" not in vars(other)
