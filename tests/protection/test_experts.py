"""A protection of experts: of each one's inputs, and left alone by each one's update."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import loki_kernels as loki
from loki_kernels.ops._directions import leave_out
from loki_kernels.protection import moments, samples
from loki_kernels.training.experts import LokiExperts
from tests.models import DEVICE, assert_unchanged, snapshot, to_device
from tests.tiny_tokenizers import chat_tokenizer
from tests.tiny_training import load_model, logits, train
from tests.training.test_experts import ROWS, build_model, one_module, routed, run, stacks
from tests.zoo.build import build

# with a dense first layer and a shared expert, transposed and biased, of several experts a token
FAMILIES = ["Mixtral", "GptOss", "Glm4Moe", "Qwen3Moe"]


def texts(count=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.randint(2, 30, (count,), generator=generator)).tolist()
    return [torch.randint(3, 75, (n,), generator=generator).tolist() for n in lengths]


def protection_of(model, seed=0, **options):
    options = {"share": 0.7, "max_directions": 10**6} | options
    return loki.estimate_protection(model, texts(seed=seed), **options)


def inputs_by_gradient(model, name, windows):
    """Each expert's inputs times its shares: the gradient of one row, a token at a time."""
    experts = model.get_submodule(name)
    given = []
    hook = experts.register_forward_pre_hook(lambda _, args: given.append(args))
    with torch.no_grad():
        for window in windows:
            model(input_ids=to_device(torch.tensor([window])))
    hook.remove()
    weight = experts.down_proj.requires_grad_()
    found = []
    for hidden, chosen, shares in given:
        for token in range(1, len(hidden)):
            own = slice(token, token + 1)
            output = experts(hidden[own], chosen[own], shares[own])
            (gradient,) = torch.autograd.grad(output[0, 0], weight)
            found.append(gradient[..., 0] if experts.is_transposed else gradient[:, 0])
    weight.requires_grad_(False)
    return torch.stack(found, dim=1).double().cpu()  # [E, tokens, in_features]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_directions_are_each_experts(family, batch_size):
    model = build_model(family)
    name = stacks(model)[-1][0]
    before = snapshot(model)
    protection = protection_of(model, batch_size=batch_size)
    assert_unchanged(model, before)
    x = inputs_by_gradient(model, name, texts())
    matrices = x.mT @ x / x.shape[1]
    directions, energies = protection.directions[name], protection.energies[name]
    assert directions.shape[:2] == x.shape[::2]
    for expert, matrix in enumerate(matrices):
        values, vectors = torch.linalg.eigh(matrix)
        count = int((energies[expert] > 0).sum())
        top = vectors[:, -count:] if count else vectors[:, :0]
        own = directions[expert]
        assert not own[:, count:].any()
        torch.testing.assert_close(own @ own.T, (top @ top.T).float(), rtol=0, atol=1e-3)
        torch.testing.assert_close(
            energies[expert, :count], values.flip(0)[:count].float(), rtol=1e-3, atol=1e-7
        )
    total = float(matrices.diagonal(dim1=1, dim2=2).sum())
    assert protection.totals[name] == pytest.approx(total, rel=1e-4)
    assert protection.shares()[name] >= 0.7


def test_a_patched_model_has_the_same():
    model = build_model("Glm4Moe")
    want = protection_of(model)
    loki.patch(model, ROWS)
    got = protection_of(model)
    assert got.fingerprint == want.fingerprint


def test_an_expert_that_nothing_reaches_is_not_protected():
    matrix = torch.diag(torch.tensor([4.0, 3.0, 2.0, 0.0, 0.0]))
    stacked = torch.stack([matrix, torch.zeros(5, 5), matrix[[0, 1, 3, 2, 4]][:, [0, 1, 3, 2, 4]]])
    directions, energies, total = moments.top_eigenvectors(stacked, 0.7, 5)
    assert directions.shape == (3, 5, 2)
    assert energies.tolist() == [[4, 3], [0, 0], [4, 3]]
    assert not directions[1].any()
    assert total == 18.0


def test_layers_that_text_passes_by_are_protected_from_nothing(caplog):
    model = build("MllamaForCausalLM", device=DEVICE)
    protection = protection_of(model)
    passed = {name for name, held in protection.directions.items() if not held.any()}
    assert 0 < len(passed) < len(protection.directions)
    assert f"no token reaches {len(passed)} of" in caplog.text
    assert all(protection.shares()[name] == 1 and not protection.totals[name] for name in passed)
    handle = loki.patch(model, protect=protection, quota=100)
    train(model)
    assert len(dict(handle.named_layers())) == len(protection.directions)


def test_an_earlier_protection_is_added():
    model = build_model("Qwen3Moe")
    name = stacks(model)[-1][0]
    earlier = protection_of(model, seed=1, share=0.9999)
    both = protection_of(model, seed=2, share=0.8, earlier=earlier)
    parts = [inputs_by_gradient(model, name, texts(seed=seed)) for seed in (1, 2)]
    matrices = sum(x.mT @ x / x.shape[1] for x in parts)
    assert both.totals[name] == pytest.approx(
        float(matrices.diagonal(dim1=1, dim2=2).sum()), rel=1e-3
    )


def test_few_tokens_an_expert_are_said(caplog):
    protection_of(build_model("Mixtral"))
    assert "tokens an expert, fewer than two for each of the" in caplog.text


def test_samples_are_not_drawn_by_copies_of_the_experts(monkeypatch):
    """transformers makes them for each token off the CPU, which suits a few samples."""
    model = build("MixtralForCausalLM")
    monkeypatch.setattr(type(model), "_optimize_model_for_decode", lambda _: pytest.fail("copies"))
    assert len(samples.draw_samples(model, chat_tokenizer(), 3, 8)) == 3
    with pytest.raises(pytest.fail.Exception, match="copies"):
        model.generate(to_device(torch.tensor([[5, 6]])), max_new_tokens=2)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 4), width=st.integers(2, 9), seed=st.integers(0, 99))
def test_leave_out_is_each_experts_projection(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(count, width, width - 1, generator=generator))[0]
    delta = torch.randn(count, 3, width, generator=generator)
    got = leave_out(delta, directions)
    for expert in range(count):
        torch.testing.assert_close(got[expert], leave_out(delta[expert], directions[expert]))


def directions_for(ours, count=3):
    """Orthonormal ones of each expert, the last expert's fewer."""
    shape = *ours.update.shape[::2], count
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(shape, generator=generator))[0]
    directions[-1, :, 1:] = 0
    return directions


def protected(family, rows, rank=None):
    """(plain experts that can be trained in full, ours of the same weights)."""
    dense, ours = one_module(family, rows)
    ours = LokiExperts(
        ours.experts, "down_proj", ours.axis, torch.tensor(rows), rank, directions_for(ours)
    )
    for _, parameter in ours.trained_parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    return dense, ours


def update_by_definition(ours):
    delta = ours.update if ours.rank is None else ours.delta_a @ ours.delta_b
    keep = to_device(torch.eye(delta.shape[-1])) - ours.directions @ ours.directions.mT
    return delta @ keep


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_values_and_every_gradient_are_the_definition_s(family, rank):
    rows = [1, 5, 17]
    dense, ours = protected(family, rows, rank)
    assert ours.why_whole is None
    trained = [p for _, p in ours.trained_parameters()]
    along = (ours.base_rows + update_by_definition(ours)).movedim(-2, ours.axis)
    weight = dense.down_proj.detach().index_copy(ours.axis, ours.index, along)
    inputs, upstream = routed(ours), to_device(torch.randn(6, ours.frozen.shape[ours.axis]))
    with torch.no_grad():
        dense.down_proj.copy_(weight)
    *want, of_weight = run(dense, dense.down_proj, inputs, upstream)
    want += torch.autograd.grad(weight, trained, of_weight)
    y = ours(inputs[0], *inputs[1:])
    torch.testing.assert_close(y, want[0])
    got = torch.autograd.grad(y, trained, upstream)
    for a, b in zip(got, want[-len(trained) :], strict=True):
        assert float(b.norm()) > 0
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


@pytest.mark.parametrize("sharded", [False, True])  # a merged copy there
def test_the_whole_form_is_protected_too(sharded):
    rows = [1, 5, 17]
    dense, ours = protected("Llama4", rows)
    assert ours.why_whole is not None
    ours.sharded = sharded
    along = (ours.base_rows + update_by_definition(ours)).movedim(-2, ours.axis)
    weight = dense.down_proj.detach().index_copy(ours.axis, ours.index, along)
    x, upstream = to_device((torch.randn(4 * 3, 32), torch.randn(12, 32)))
    with torch.no_grad():
        dense.down_proj.copy_(weight)
    (of_weight,) = torch.autograd.grad(dense(x), dense.down_proj, upstream)
    (want,) = torch.autograd.grad(weight, ours.update, of_weight)
    y = ours(x)
    torch.testing.assert_close(y, dense(x))
    (got,) = torch.autograd.grad(y, ours.update, upstream)
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Glm4Moe"])
def test_what_is_merged_and_saved_leaves_the_directions_out(family, rank, tmp_path):
    model = build_model(family)
    model.save_pretrained(tmp_path / "base")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    protection = protection_of(model)
    protection.save(tmp_path / "protection.safetensors")
    handle = loki.patch(model, ROWS, rank=rank, protect=tmp_path / "protection.safetensors")
    train(model)
    trained = logits(model)
    model.save_pretrained(tmp_path / "checkpoint")
    loki.save_adapter(model, tmp_path / "adapter")
    handle.merge()
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)
    for name, module in stacks(model):
        change = module.down_proj.detach() - base[f"{name}.down_proj"]
        change = change.mT if module.is_transposed else change
        assert change.abs().max() > 1e-3
        assert (change @ to_device(protection.directions[name])).abs().max() < 1e-5
    for reopened in (
        load_model(tmp_path / "checkpoint"),
        loki.load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter").merge(),
    ):
        torch.testing.assert_close(logits(reopened), trained, rtol=1e-4, atol=1e-4)
    again = load_model(tmp_path / "base")
    loki.patch(again, tmp_path / "checkpoint", protect=protection)
    train(again)
    unprotected = load_model(tmp_path / "base")
    loki.patch(unprotected, tmp_path / "checkpoint", protect=False)
    with pytest.raises(RuntimeError, match="with the same one"):
        train(unprotected.train())


def test_compiled_it_trains_the_same():
    def trained(change):
        model = build_model("Mixtral")
        loki.patch(model, ROWS, protect=protection)
        change(model)
        return logits(train(model))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    protection = protection_of(build_model("Mixtral"))
    want = trained(lambda model: None)
    compiled = trained(lambda model: model.compile(backend=counter, fullgraph=True))
    torch.testing.assert_close(compiled, want, rtol=1e-4, atol=1e-4)
    assert counter.frame_count >= 1


def test_what_cannot_be_told_or_is_of_another_model_is_refused():
    model = build_model("Llama4")
    before = snapshot(model)
    with pytest.raises(loki.UnsupportedModelError, match=r"holds experts.*cannot be told"):
        protection_of(model)
    with pytest.raises(loki.UnsupportedModelError, match="cannot be told"):
        loki.estimate_protection(model, tokenizer=object())  # before anything is drawn
    assert_unchanged(model, before)
    model = build_model("Mixtral")
    before = snapshot(model)
    protection = protection_of(model)
    fewer = copy.deepcopy(protection)
    name = stacks(model)[0][0]
    fewer.directions[name] = fewer.directions[name][1:]
    with pytest.raises(ValueError, match=r"has 4 experts of \d+ inputs, and 3 experts of"):
        loki.patch(model, ROWS, protect=fewer)
    fewer.directions[name] = fewer.directions[name][0]
    with pytest.raises(ValueError, match=r"has 4 experts of (\d+) inputs, and \1 inputs there"):
        loki.patch(model, ROWS, protect=fewer)
    assert_unchanged(model, before)


def test_experts_of_eight_bits_are_refused():
    model = build_model("Qwen3Moe")
    for name, experts in model.named_modules():
        if name.endswith("experts"):
            for weight in experts.parameters(recurse=False):
                weight.requires_grad_(False).data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(loki.UnsupportedModelError, match="float8_e4m3fn; load the model unquant"):
        loki.estimate_protection(model, texts())
