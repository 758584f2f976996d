"""patch(protect=): the update leaves the protected directions alone, wherever it is formed."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import weakref
from contextlib import nullcontext
from functools import cache, partial

import pytest
import safetensors.torch
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments

import loki_kernels as loki
from loki_kernels.attribution import analysis
from loki_kernels.protection import estimate
from loki_kernels.questions import CALIBRATION_PER_SUBJECT
from loki_kernels.training import patching, rows
from loki_kernels.training.arithmetic import whole_update
from loki_kernels.training.linear import LokiLinear
from tests.models import build_model, to_device
from tests.tiny_tokenizers import chat_tokenizer
from tests.tiny_training import (
    ROWS,
    WordTokenizer,
    batch_answers,
    load_model,
    logits,
    protection_of,
    straight_and_resumed,
    tiny_trainer,
    token_batch,
    train,
    train_averaged,
)


@pytest.fixture(scope="module")
def protection():
    return protection_of(build_model())


class Estimated(Exception):
    """That a protection is estimated where one that was kept should do."""


def estimate_again(*_, **__):
    raise Estimated


def layer_with(directions, rank=None, dtype=torch.float64, rows=(1, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(11, 6, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(6, 11, generator=generator))
        linear.bias.copy_(torch.randn(6, generator=generator))
    torch.manual_seed(seed)
    layer = LokiLinear(to_device(linear), list(rows), rank, directions)
    for _, parameter in layer.trained_parameters():
        torch.nn.init.normal_(parameter)
    return layer


def directions_of(width=11, count=4):
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.float64))[0]


def naive(layer, x, directions):
    """The definition, in dense products."""
    keep = torch.eye(len(directions), dtype=x.dtype, device=x.device)
    keep = keep - directions @ directions.T
    delta = layer.update if layer.rank is None else layer.delta_a @ layer.delta_b
    weight = layer.weight.detach().clone()
    weight[layer.index] = layer.base_rows
    weight = weight.index_add(0, layer.index, delta @ keep)
    return torch.nn.functional.linear(x, weight, layer.bias)


@pytest.mark.parametrize("form", ["written", "delta", "compiled"])
@pytest.mark.parametrize("rank", [None, 2])
def test_values_and_every_gradient_are_the_definition_s(form, rank):
    directions = to_device(directions_of())
    layer = layer_with(directions, rank)
    layer.sharded = form == "delta"
    x = to_device(torch.randn(3, 5, 11, dtype=torch.float64)).transpose(0, 1)
    x.requires_grad_()
    leaves = [x, *(p for _, p in layer.trained_parameters())]
    want = naive(layer, x, directions)
    out_grad = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, leaves, out_grad)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    got = compiled(x) if form == "compiled" else layer(x)
    assert counter.frame_count == (form == "compiled")
    torch.testing.assert_close(got, want)
    for got_grad, want_grad in zip(
        torch.autograd.grad(got, leaves, out_grad), want_grads, strict=True
    ):
        torch.testing.assert_close(got_grad, want_grad)


def test_the_directions_are_not_seen():
    """Inputs inside the protected directions get the base's outputs, bit for bit of rounding."""
    directions = to_device(directions_of())
    layer = layer_with(directions)
    inside = to_device(torch.randn(7, 4, dtype=torch.float64)) @ directions.T
    base = torch.nn.functional.linear(inside, layer.weight.detach(), layer.bias)
    torch.testing.assert_close(layer(inside), base, rtol=1e-12, atol=1e-12)
    outside = to_device(torch.randn(7, 11, dtype=torch.float64))
    other = torch.nn.functional.linear(outside, layer_with(directions).weight, layer.bias)
    assert (layer(outside) - other).abs().max() > 0.1


def test_an_optimizer_step_between_the_passes_is_noticed():
    layer = layer_with(to_device(directions_of()))
    y = layer(to_device(torch.randn(2, 11, dtype=torch.float64)))
    with torch.no_grad():
        layer.update.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_coarse_weights_leave_out_nearly_all():
    directions = directions_of()
    layer = layer_with(to_device(directions), dtype=torch.bfloat16)
    assert layer.directions.dtype == torch.bfloat16
    acting = layer.formed_update()["update"].cpu().double()
    left = (acting @ directions).norm() / layer.update.detach().cpu().double().norm()
    assert left < 0.01


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("fuse_mlp", [False, True])
def test_what_is_merged_and_saved_leaves_the_directions_out(rank, fuse_mlp, protection, tmp_path):
    model = build_model()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    untouched = logits(model)
    handle = loki.patch(model, ROWS, rank=rank, protect=protection, fuse_mlp=fuse_mlp)
    assert torch.equal(logits(model), untouched)
    train(model)
    trained = logits(model)
    assert not torch.equal(trained, untouched)
    model.save_pretrained(tmp_path / "checkpoint")
    loki.save_adapter(model, tmp_path / "adapter")
    loki.export_lora(model, tmp_path / "lora")
    merged = copy.deepcopy(model)
    for name, directions in protection.directions.items():
        change = merged.get_submodule(name).merged_weight().cpu() - base[f"{name}.weight"].cpu()
        assert change.abs().max() > 1e-3
        assert (change @ directions).abs().max() < 1e-5
    handle.merge()
    torch.testing.assert_close(logits(model), trained)
    for reopened in (
        load_model(tmp_path / "checkpoint"),
        loki.load_adapter(build_model(), tmp_path / "adapter").merge(),
        loki.load_adapter(build_model(), tmp_path / "checkpoint").merge(),
    ):
        torch.testing.assert_close(logits(reopened), trained, rtol=1e-4, atol=1e-4)
    factors = safetensors.torch.load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, directions in protection.directions.items():
        a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert (b @ a @ directions).abs().max() < 1e-5
    peft = pytest.importorskip("peft")
    exported = peft.PeftModel.from_pretrained(build_model(), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(exported), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [None, 2])
def test_training_goes_on_bit_for_bit_from_a_state_dict(rank, protection):
    torch.manual_seed(0)
    straight = build_model()
    loki.patch(straight, ROWS, rank=rank, protect=protection)
    train(straight)
    state = copy.deepcopy(straight.state_dict())
    resumed = build_model()
    loki.patch(resumed, ROWS, rank=rank, protect=protection)
    resumed.load_state_dict(state)
    for model in (straight, resumed):
        train(model)
    assert torch.equal(logits(straight), logits(resumed))
    other = build_model()
    loki.patch(other, ROWS, rank=rank, protect=protection_of(build_model(), seed=5))
    with pytest.raises(RuntimeError, match="another protection"):
        other.load_state_dict(state)


def test_a_trainer_resumes_with_the_same_protection_alone(protection, tmp_path):
    model = build_model()
    handle = loki.patch(model, ROWS, protect=protection)
    tiny_trainer(model, tmp_path, 3, [handle.trainer_callback()]).train()
    folder = tmp_path / "checkpoint-3"

    resumed = build_model()
    handle = loki.patch(resumed, ROWS, protect=protection)
    trainer = tiny_trainer(resumed, tmp_path, 5, [handle.trainer_callback()])
    trainer.train(resume_from_checkpoint=str(folder))

    other = build_model()
    handle = loki.patch(other, ROWS)
    with pytest.raises(ValueError, match="trained with a protection"):
        tiny_trainer(other, tmp_path, 5, [handle.trainer_callback()]).train(
            resume_from_checkpoint=str(folder)
        )
    # another one than the checkpoint's is refused, and the message names that
    other = build_model()
    handle = loki.patch(other, ROWS, protect=protection_of(build_model(), seed=5))
    with pytest.raises(ValueError, match=r"another protection, which is .*loki_rows\.protection"):
        tiny_trainer(other, tmp_path, 5, [handle.trainer_callback()]).train(
            resume_from_checkpoint=str(folder)
        )
    # reading it to evaluate or merge takes no protection; training on does
    plain = build_model()
    loki.patch(plain, folder, protect=False)
    torch.testing.assert_close(logits(plain), logits(load_model(folder)))
    with pytest.raises(RuntimeError, match="with the same one"):
        train(plain.train())
    for protect in (None, True, protection):
        again = build_model()
        handle = loki.patch(again, folder, protect=protect)
        assert handle.protection.fingerprint == protection.fingerprint
        train(again)
    # with another one the update would act otherwise than it was saved
    refused = build_model()
    want = logits(refused)
    with pytest.raises(ValueError, match="another protection"):
        loki.patch(refused, folder, protect=protection_of(build_model(), seed=5))
    assert torch.equal(logits(refused), want)


def test_an_adapter_is_trained_on_with_its_protection_alone(protection, tmp_path):
    model = build_model()
    loki.patch(model, ROWS, protect=protection)
    train(model)
    loki.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "loki_rows.protection").unlink()
    loaded = build_model()
    loki.load_adapter(loaded, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model))
    with pytest.raises(RuntimeError, match="with the same one"):
        train(loaded.train())


def test_every_row_is_trained_without_an_analysis(protection, monkeypatch):
    monkeypatch.setattr(analysis, "attribute", None)
    model = build_model()
    handle = loki.patch(model, quota=100, protect=protection)
    assert set(handle.report.patched.values()) == {48}


def test_a_protection_is_estimated_once(monkeypatch, tmp_path):
    monkeypatch.setenv("LOKI_KERNELS_CACHE", str(tmp_path))
    drawn = [[5, 6, 7, 8, 9], [11, 12, 13]]
    monkeypatch.setattr(estimate, "draw_samples", lambda *_, **__: drawn)
    monkeypatch.setattr(estimate, "openings_of", list)
    model = build_model()
    handle = loki.patch(model, ROWS, protect=True, tokenizer="a")
    handle.unpatch()
    monkeypatch.setattr(estimate, "estimate_protection", estimate_again)
    handle = loki.patch(model, ROWS, protect=True, tokenizer="a")
    handle.unpatch()
    with pytest.raises(Estimated):  # texts that open otherwise are other samples
        loki.patch(model, ROWS, protect=True, tokenizer="b")
    model.config.rms_norm_eps *= 2  # the same weights, another function
    with pytest.raises(Estimated):
        loki.patch(model, ROWS, protect=True, tokenizer="a")
    model.config.rms_norm_eps /= 2
    model.generation_config.min_p = 0.1  # which samples do not heed
    handle = loki.patch(model, ROWS, protect=True, tokenizer="a")
    handle.unpatch()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(Estimated):
        loki.patch(model, ROWS, protect=True, tokenizer="a")


def test_what_is_no_protection_of_the_model_is_refused(protection, tmp_path):
    model = build_model("gpt_neox")
    with pytest.raises(ValueError, match="another model: it lacks"):
        loki.patch(model, ROWS, protect=protection)
    wide = build_model()
    narrow = copy.deepcopy(protection)
    narrow.directions["model.layers.0.mlp.down_proj"] = torch.eye(7)[:, :2]
    with pytest.raises(ValueError, match="112 inputs, and 7"):
        loki.patch(wide, ROWS, protect=narrow)
    with pytest.raises(FileNotFoundError):
        loki.patch(wide, ROWS, protect=tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="directions must be"):
        LokiLinear(torch.nn.Linear(4, 3), [0], directions=torch.eye(3))


def test_a_protection_of_a_model_of_another_name_is_warned_of(protection, tmp_path, caplog):
    """Shapes say nothing: Mistral-7B's and Llama-3.1-8B's are the same."""
    named = copy.deepcopy(protection)
    named.info["model"] = "meta-llama/Llama-3.1-8B"
    model = build_model()
    for name in ("", "models/Llama-3.1-8B"):  # unknown; the same in a folder
        model.name_or_path = name
        loki.patch(model, ROWS, protect=named).unpatch()
    assert "worse than none" not in caplog.text
    model.name_or_path = "mistralai/Mistral-7B-v0.3"
    handle = loki.patch(model, ROWS, protect=named)
    said = "was estimated from meta-llama/Llama-3.1-8B, and this model is mistralai/Mistral-7B-v0.3"
    assert said in caplog.text
    train(model)
    model.save_pretrained(tmp_path)
    handle.unpatch()
    caplog.clear()
    loki.patch(model, tmp_path)  # with what lies beside it, whose base is compared
    assert "worse than none" not in caplog.text


def test_accumulation_autocast_and_checkpointing_train_it(protection):
    model = build_model().train()
    loki.patch(model, ROWS, protect=protection)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = token_batch(4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(2):
        for part in batch.chunk(2):
            with torch.autocast(batch.device.type, torch.bfloat16):
                model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, directions in protection.directions.items():
        update = model.get_submodule(name).update.detach().cpu()
        # SGD adds projected gradients, so that the parameter itself stays outside
        assert update.abs().max() > 0
        assert (update @ directions).norm() < 1e-4 * update.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_its_fingerprint_is_the_files_whatever_the_layers_hold(protection, dtype, tmp_path):
    """Some layers alone, in a dtype that rounds the directions otherwise."""
    path = tmp_path / "protection.safetensors"
    protection.save(path)
    model = build_model(dtype=dtype)
    handle = loki.patch(model, [[1, 5], [], [7]], protect=path)
    train(model, steps=1, lr=1e-3)
    loki.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "checkpoint")
    handle.unpatch()
    again = loki.patch(model, tmp_path / "checkpoint", protect=path)
    again.unpatch()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["protection"] == protection.fingerprint


def test_a_checkpoint_is_an_ordinary_one(protection, tmp_path):
    model = build_model()
    loki.patch(model, ROWS, protect=protection)
    train(model)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(m, LokiLinear) for m in plain.modules())
    with safetensors.safe_open(tmp_path / "loki_rows.update", framework="pt") as file:
        assert file.metadata()["protection"] == protection.fingerprint


def test_all_rows_protected_unless_something_says_what_to_train(tmp_path, monkeypatch):
    model = build_model()
    monkeypatch.setenv("LOKI_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(estimate, "draw_samples", cache(estimate.draw_samples))  # both draw alike
    asked = {"tokenizer": chat_tokenizer()}
    want = loki.estimate_protection(model, **asked)
    with loki.patch(model, **asked) as handle:
        assert handle.rows.counts == [48] * 3
        held = {layer.protection.fingerprint for _, layer in handle.named_layers()}
        assert held == {want.fingerprint} == {handle.protection.fingerprint}
        assert handle.report.protected == 8  # a fourteenth of 112
        assert "8 directions" in str(handle.report)
    with loki.patch(model, protect=False) as handle:
        assert handle.rows.counts == [48] * 3
        assert handle.report.protected == 0
    for analysed in ({"quota": 10}, {"analysis": {"steps": 3}}):
        with loki.patch(model, tokenizer=WordTokenizer(), **analysed) as handle:  # the paper's
            assert handle.rows.counts == [4] * 3
            assert handle.report.protected == 0
    with loki.patch(model, ROWS) as handle:
        assert handle.report.protected == 0


def test_the_papers_rows_are_one_argument_away(tmp_path, monkeypatch):
    """10 % of each layer's rows whose scores are lowest, unprotected; ours are nearest to zero."""
    monkeypatch.setenv("LOKI_KERNELS_CACHE", str(tmp_path))
    model, tokenizer = build_model(), WordTokenizer()
    questions = [q.prompt(tokenizer) for q in loki.load_questions(CALIBRATION_PER_SUBJECT)]
    scores = loki.attribute(model, questions, tokenizer=tokenizer)
    rows = {}
    for options, criterion in (({"criterion": "signed"}, "signed"), ({"quota": 10}, "magnitude")):
        with loki.patch(model, tokenizer=tokenizer, **options) as handle:
            assert handle.rows == loki.select(scores, 10, criterion=criterion)
            assert handle.rows.counts == [4] * 3
            assert handle.report.protected == 0
            rows[criterion] = handle.rows
    assert rows["signed"].overlap(rows["magnitude"]) < 0.5
    for options in ({"quota": 5}, {"criterion": "signed"}, {"analysis": {"steps": 3}}):
        with pytest.raises(ValueError, match="chooses rows, and rows= names them"):
            loki.patch(model, ROWS, **options)
    with pytest.raises(ValueError, match="criterion='lowest' is unknown"):
        loki.patch(model, criterion="lowest")


def test_the_handle_has_what_an_update_is_protected_with(protection, tmp_path):
    """What `protect=True` estimated, for another machine, whose cache has none."""
    handle = loki.patch(build_model(), ROWS, protect=protection)
    handle.protection.save(tmp_path / "protection.safetensors")
    train(handle.model)
    handle.model.save_pretrained(tmp_path / "out")
    again = build_model()
    loki.patch(again, tmp_path / "out", protect=tmp_path / "protection.safetensors")
    train(again)
    assert loki.patch(build_model(), ROWS).protection is None


@pytest.mark.parametrize(("rank", "launches"), [(None, [1, 1, 1]), (2, [])])
def test_generating_forms_a_protected_update_once(rank, launches, protection, monkeypatch):
    """A launch a layer, whatever the number of tokens; with a rank nothing is written at all."""
    model = build_model()
    handle = loki.patch(model, ROWS, rank=rank, protect=protection)
    train(model)
    model.eval()
    prompt = {"input_ids": token_batch()[:, :4], "pad_token_id": 0}
    want = type(model).generate(model, **prompt, do_sample=False, max_new_tokens=6)
    want_batch = batch_answers(partial(type(model).generate_batch, model))
    written = []
    real = rows.sync_rows

    def sync_rows(weights, *args, **options):
        written.append(len(weights))
        return real(weights, *args, **options)

    monkeypatch.setattr(rows, "sync_rows", sync_rows)
    got = model.generate(**prompt, do_sample=False, max_new_tokens=6)
    assert torch.equal(got, want)
    assert written == launches
    written.clear()
    assert batch_answers(model.generate_batch) == want_batch
    assert written == launches
    assert not any(layer.held or layer.in_step for _, layer in handle.named_layers())
    copied = copy.deepcopy(model)
    train(copied)
    assert torch.equal(model.generate(**prompt, do_sample=False, max_new_tokens=6), want)
    handle.unpatch()
    assert not {"generate", "generate_batch"} & vars(model).keys()


def without_protection(tmp_path, protection):
    """A base patched with a protected update, to be used."""
    model = build_model()
    loki.patch(model, ROWS, protect=protection)
    train(model).save_pretrained(tmp_path)
    plain = build_model()
    loki.patch(plain, tmp_path, protect=False)
    return plain


def merged_alone(tmp_path, protection):
    """A patched model that was loaded with merged weights of another run."""
    other = build_model()
    loki.patch(other, ROWS).model.get_submodule("model.layers.0.mlp.down_proj").update.data += 0.1
    other.save_pretrained(tmp_path)
    model = build_model()
    loki.patch(model, ROWS)
    model.load_state_dict(load_model(tmp_path).state_dict(), strict=False)
    return model


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("made", [without_protection, merged_alone])
def test_what_cannot_be_trained_on_is_refused_in_any_mode(made, compiled, protection, tmp_path):
    """`from_pretrained` gives models in evaluation mode, in which README's loop trains."""
    model = made(tmp_path, protection).eval()
    want = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model(input_ids=token_batch())
    run = model
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager")
    batch = token_batch(2)
    loss = run(input_ids=batch, labels=batch).loss
    with pytest.raises(RuntimeError, match=r"cannot be trained on|not the update itself"):
        loss.backward()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, want[name]), name


def test_training_in_a_held_forward_pass_is_refused_in_any_mode(protection):
    model = build_model().eval()
    handle = loki.patch(model, ROWS, protect=protection)
    batch = token_batch(2)
    with handle.inference(), pytest.raises(RuntimeError, match=r"inside handle\.inference\(\)"):
        model(input_ids=batch, labels=batch).loss.backward()
    train(model)


@pytest.mark.parametrize("saved", ["one", "none"])
def test_a_coarse_state_dict_tells_its_protection(saved, protection):
    """In bfloat16 the rows themselves are alike within their rounding."""
    base = build_model(dtype=torch.bfloat16)
    model = copy.deepcopy(base)
    loki.patch(model, ROWS, protect=protection if saved == "one" else None)
    train(model, steps=1, lr=1e-5)
    state = model.state_dict()
    for other in (protection_of(build_model(), seed=5), None if saved == "one" else protection):
        again = copy.deepcopy(base)
        loki.patch(again, ROWS, protect=other)
        with pytest.raises(RuntimeError, match="another protection"):
            again.load_state_dict(state)


def test_merged_rows_of_another_run_are_not_projected(protection, tmp_path):
    model = build_model()
    loki.patch(model, ROWS)
    train(model).save_pretrained(tmp_path)
    merged = load_model(tmp_path).state_dict()
    protected = build_model()
    handle = loki.patch(protected, ROWS, protect=protection)
    protected.load_state_dict(merged, strict=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="not the update itself"):
        protected(input_ids=token_batch())
    with pytest.raises(RuntimeError, match="not the update itself"):
        handle.merge()
    handle.unpatch()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainer_resumes_from_the_folder(dtype, protection, tmp_path):
    """Without the callback: the Trainer loads the merged weights over what was read."""

    def run(folder, resume=None):
        model = build_model(dtype=dtype)
        handle = loki.patch(model, resume or ROWS, protect=protection)
        tiny_trainer(model, folder, 6).train(resume_from_checkpoint=resume)
        return {name: layer.formed_update()["update"] for name, layer in handle.named_layers()}

    straight, resumed = straight_and_resumed(run, tmp_path)
    for name, tensor in straight.items():
        close = 1e-5 if dtype == torch.float32 else 0.02
        assert (resumed[name] - tensor).norm() <= close * tensor.norm(), name


def test_gradients_of_float16_are_projected_however_small():
    layer = layer_with(directions_of(), dtype=torch.float32)
    layer.half()
    x = torch.randn(3, 11, dtype=torch.float16, device=layer.index.device)
    update = layer.update.data.float()
    layer.update.data = update
    for factor in (1.0, 2.0**-24):
        upstream = factor * torch.ones(3, 6, device=x.device)
        (gradient,) = torch.autograd.grad(layer(x).float(), layer.update, upstream)
        kept = gradient.float() @ directions_of().to(gradient.device, torch.float32)
        assert kept.norm() < 0.05 * gradient.float().norm()


def test_a_state_dict_without_weights_tells_its_protection(protection):
    """As DeepSpeed's, or one without what is frozen."""
    model = build_model()
    loki.patch(model, ROWS, protect=protection)
    train(model, steps=1)
    state = {n: t for n, t in model.state_dict().items() if not n.endswith("weight")}
    for other in (protection_of(build_model(), seed=5), None):
        again = build_model()
        handle = loki.patch(again, ROWS, protect=other)
        with pytest.raises(RuntimeError, match="another protection"):
            again.load_state_dict(state, strict=False)
        assert all(not layer.update.any() for _, layer in handle.named_layers())


def test_a_distributed_checkpoint_tells_its_protection(protection, tmp_path):
    """It is read into the tensors of the state dict that the model gives; of gentle updates."""

    def patched(protect):
        model = build_model(dtype=torch.bfloat16)
        loki.patch(model, ROWS, protect=protect)
        return model

    torch.distributed.checkpoint.save(
        get_model_state_dict(train(patched(protection), 1, lr=1e-6)), checkpoint_id=tmp_path
    )
    for protect, refused in ((protection, False), (protection_of(build_model(), 1), True)):
        model = patched(protect)
        state = get_model_state_dict(model)
        torch.distributed.checkpoint.load(state, checkpoint_id=tmp_path)
        with pytest.raises(RuntimeError, match="another prot") if refused else nullcontext():
            set_model_state_dict(model, state)


def test_a_callback_refuses_a_protected_checkpoint_of_an_unprotected_model(protection, tmp_path):
    """A distributed one tells no model of what the model has not."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    resumed = TrainerState(global_step=2)
    protected = loki.patch(build_model(), ROWS, protect=protection).trainer_callback()
    protected.on_save(arguments, resumed, None)
    protected.on_train_begin(arguments, resumed, None)
    unprotected = loki.patch(build_model(), ROWS).trainer_callback()
    with pytest.raises(ValueError, match=r"protect='.*checkpoint-2/loki_rows.protection'"):
        unprotected.on_train_begin(arguments, resumed, None)
    unprotected.on_train_begin(arguments, TrainerState(), None)
    unprotected.on_save(arguments, resumed, None)  # a run that began anew in the same folder
    unprotected.on_train_begin(arguments, resumed, None)


@pytest.mark.parametrize("rank", [None, 2])
def test_an_untrained_update_is_not_formed_to_be_saved(rank, protection, monkeypatch):
    """accelerate asks every process for the state dict, on the CPU, before it shards the model."""
    model = build_model()
    want = model.state_dict()["model.layers.0.mlp.down_proj.weight"].clone()
    handle = loki.patch(model, protect=protection, rank=rank)
    formed = []
    monkeypatch.setattr(rows, "leave_out", lambda x, _: formed.append(x.shape) or x)
    state = model.state_dict()
    assert torch.equal(state["model.layers.0.mlp.down_proj.weight"], want)
    layers = [layer for _, layer in handle.named_layers()]
    assert not any(layer.written for layer in layers)
    assert len(formed) == (0 if rank is None else len(layers))
    monkeypatch.undo()
    train(model)
    assert not torch.equal(model.state_dict()["model.layers.0.mlp.down_proj.weight"], want)
    for layer in layers:  # what was written is written again
        dict(layer.trained_parameters())["update" if rank is None else "delta_a"].data.zero_()
    assert torch.equal(model.state_dict()["model.layers.0.mlp.down_proj.weight"], want)


def test_a_protected_update_is_formed_where_its_directions_lie(monkeypatch):
    """Not on the CPU, whose values a state dict holds that was offloaded."""
    layer = layer_with(to_device(directions_of()))
    layer.directions = layer.directions.to("meta")
    where = []
    monkeypatch.setattr(
        rows, "leave_out", lambda x, _: where.append(x.device.type) or torch.ones(2, 11)
    )
    formed = layer.formed({"update": torch.zeros(2, 11)})["update"]
    assert (where, formed.device.type) == (["meta"], "cpu")


def test_what_no_file_holds_is_refused_before_training(protection, tmp_path):
    odd = dataclasses.replace(protection, info={"made": tmp_path})
    with pytest.raises(ValueError, match="cannot be saved with a checkpoint"):
        loki.patch(build_model(), ROWS, protect=odd)
    shared = torch.eye(112)[:, :3].contiguous()
    names = protection.directions
    made = loki.Protection(
        dict.fromkeys(names, shared), dict.fromkeys(names, torch.ones(3)), dict.fromkeys(names, 4.0)
    )
    model = build_model()
    loki.patch(model, ROWS, protect=made)
    model.save_pretrained(tmp_path)
    kept = loki.Protection.load(tmp_path / "loki_rows.protection")
    assert kept.fingerprint == made.fingerprint


def test_a_copy_refuses_as_its_original_does(protection, tmp_path):
    model = copy.deepcopy(without_protection(tmp_path, protection)).eval()
    batch = token_batch(2)
    with pytest.raises(RuntimeError, match="cannot be trained on"):
        model(input_ids=batch, labels=batch).loss.backward()


SAVES = {
    "adapter": lambda handle, folder: loki.save_adapter(handle.model, folder),
    "checkpoint": lambda handle, folder: handle.model.save_pretrained(folder),
}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("unprotected", [False, True])
def test_an_update_that_is_used_takes_its_protection_along(save, unprotected, protection, tmp_path):
    model = build_model()
    loki.patch(model, ROWS, protect=protection)
    loki.save_adapter(train(model), tmp_path / "one")
    handle = (
        loki.patch(build_model(), tmp_path / "one", protect=False)
        if unprotected
        else loki.load_adapter(build_model(), tmp_path / "one")
    )
    (tmp_path / "two").mkdir()
    protection_of(build_model(), seed=5).save(tmp_path / "two" / "loki_rows.protection")
    SAVES[save](handle, tmp_path / "two")  # where another's lies
    again = loki.patch(build_model(), tmp_path / "two")
    assert again.protection.fingerprint == protection.fingerprint
    train(again.model)
    folder = "one" if save == "adapter" else "two"
    SAVES[save](loki.load_adapter(build_model(), tmp_path / folder), tmp_path / folder)
    assert loki.patch(build_model(), tmp_path / folder).protection is not None


@pytest.mark.parametrize("save", SAVES)
def test_an_update_without_its_protection_s_file_stays_protected(save, protection, tmp_path):
    model = build_model()
    loki.patch(model, ROWS, protect=protection)
    loki.save_adapter(train(model), tmp_path / "one")
    (tmp_path / "one" / "loki_rows.protection").write_bytes(b"damaged")
    (tmp_path / "two").mkdir()
    SAVES[save](loki.load_adapter(build_model(), tmp_path / "one"), tmp_path / "two")
    assert not (tmp_path / "two" / "loki_rows.protection").exists()
    with pytest.raises(RuntimeError, match="cannot be trained on: it was trained with a prot"):
        train(loki.load_adapter(build_model(), tmp_path / "two").model)
    config = tmp_path / "two" / "adapter_config.json"
    if config.is_file():
        assert json.loads(config.read_text())["protection"] == protection.fingerprint


def test_what_is_loaded_then_may_be_trained_on(protection, tmp_path):
    model = build_model()
    loki.patch(model, ROWS)
    train(model).save_pretrained(tmp_path / "unprotected")
    protected = build_model()
    loki.patch(protected, ROWS, protect=protection)
    train(protected).save_pretrained(tmp_path / "protected")
    other = build_model().eval()
    handle = loki.patch(other, tmp_path / "protected", protect=False)
    handle.load_state(tmp_path / "unprotected")
    train(other)


def test_unpatching_frees_the_update_at_once(protection):
    model = build_model()
    handle = loki.patch(model, ROWS, protect=protection)
    callback = handle.trainer_callback()  # which a Trainer keeps, as a notebook does the handle
    train(model, steps=1)
    update = weakref.ref(dict(handle.named_layers())["model.layers.0.mlp.down_proj"].update)
    gc.collect()
    gc.disable()
    try:
        handle.unpatch()
        assert update() is None
        assert not callback.layers
    finally:
        gc.enable()


def in_tf32(delta, directions):
    """`leave_out` as a GPU makes it with TF32 products, whose operands have 11 bits."""
    if directions is None:
        return delta
    held = eleven_bits(delta) @ eleven_bits(directions)
    return delta - eleven_bits(held) @ eleven_bits(directions).mT


def eleven_bits(values):
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("protected", [False, True])
def test_a_state_dict_trained_in_tf32_is_read_on_the_host(rank, protected, monkeypatch):
    """As Lightning restores a checkpoint, before it moves the model."""
    directions = directions_of() if protected else None
    trained = layer_with(directions, rank, torch.float32)
    weight = trained.weight.detach().clone()
    monkeypatch.setattr(rows, "leave_out", in_tf32)
    factors = trained.formed_update().values()
    monkeypatch.undo()
    update = whole_update(*(factors if rank is None else map(eleven_bits, factors)))
    state = dict(trained.state_dict())
    state["weight"] = trained.put_rows(weight, trained.base_rows + update)
    again = layer_with(directions, rank, torch.float32)
    again.load_state_dict(state)
    for name, parameter in again.trained_parameters():
        assert torch.equal(parameter, state[name])
    other = layer_with(directions, rank, torch.float32, seed=1)
    with pytest.raises(RuntimeError, match="of other base weights"):
        other.load_state_dict(state)


@pytest.mark.parametrize("protected", [False, True])
def test_what_writes_the_rows_between_compiled_steps_changes_nothing(protected, protection):
    """A compiled step adds what the weight lacks of the update, and here the weight has it all."""

    def trained(change):
        torch._dynamo.reset()
        model = build_model()
        loki.patch(model, ROWS, protect=protection if protected else None)
        run = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        batch = token_batch(4)
        for _ in range(3):
            run(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            change(model)
        return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("update")}

    want = trained(lambda model: None)
    for change in (lambda model: model.state_dict(), logits):
        got = trained(change)
        assert len(got) == 3
        for name, update in got.items():
            torch.testing.assert_close(update, want[name], rtol=1e-3, atol=1e-4, msg=name)


def test_gentle_rows_of_another_run_are_not_projected_in_16_bits(protection):
    """All that they have learned would be left out, which is less than a rounding of the rows."""
    base = build_model(dtype=torch.bfloat16)
    other = copy.deepcopy(base)
    handle = loki.patch(other, ROWS)
    with torch.no_grad():
        for name, layer in handle.named_layers():
            along = to_device(protection.directions[name][:, 0])
            size = 0.6 * torch.finfo(torch.bfloat16).eps * layer.base_rows.float().norm(dim=1)
            layer.update.copy_(size[:, None] * along)
    merged = {n: t.clone() for n, t in other.state_dict().items() if n.endswith("weight")}
    protected = copy.deepcopy(base)
    loki.patch(protected, ROWS, protect=protection)
    protected.load_state_dict(merged, strict=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="not the update itself"):
        protected(input_ids=token_batch())


@pytest.mark.parametrize(
    ("named", "error"),
    [
        ("no.json", FileNotFoundError),
        ([[1], [2]], ValueError),
        ([[48], [1], [1]], ValueError),
        ([1, 2, 3], ValueError),
        ("{unprotected}", ValueError),  # an update that had no protection
    ],
)
def test_rows_are_read_before_a_protection_is_estimated(named, error, monkeypatch, tmp_path):
    if named == "{unprotected}":
        loki.patch(build_model(), ROWS).model.save_pretrained(tmp_path)
        named = tmp_path
    monkeypatch.setattr(patching, "protection_to_keep", lambda *_: pytest.fail("estimated"))
    with pytest.raises(error):
        loki.patch(build_model(), named, protect=True, tokenizer=object())


def test_no_modules_to_save_are_none_of_them():
    assert not loki.patch(build_model(), ROWS, modules_to_save=None).report.whole


def test_weights_that_zero_3_has_split_are_estimated_from_in_no_process():
    """Of one alone too, whose weights are empty outside of a layer's forward pass."""
    model = build_model()
    model.model.norm.weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 has split the weights"):
        loki.patch(model, ROWS, protect=True, tokenizer=object())
    with pytest.raises(ValueError, match="ZeRO-3 has split the weights"):
        loki.estimate_protection(model, [[1, 2, 3]])


@pytest.mark.parametrize("split", [False, True])
def test_16_bits_beside_the_update_are_refused_where_zero_3_keeps_one_buffer(split):
    model = build_model(dtype=torch.bfloat16)
    if split:
        model.model.norm.weight.ds_id = 0
        with pytest.raises(ValueError, match=r"model\.norm.* trained whole in bfloat16"):
            loki.patch(model, ROWS, modules_to_save=["norm"])
        model.model.norm.float()
    loki.patch(model, ROWS, modules_to_save=["norm"])


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("protected", [False, True])
def test_an_average_is_of_the_same_rows(protected, use_buffers, protection):
    protect = protection if protected else None
    model = build_model()
    loki.patch(model, ROWS, protect=protect)
    averaged, want = train_averaged(model, use_buffers)
    again = build_model()
    loki.patch(again, ROWS, protect=protect)
    again.load_state_dict(averaged.state_dict())  # it compares rows and protections
    for name, parameter in again.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.detach(), want[name], msg=name)
    torch.testing.assert_close(logits(averaged), logits(again))


def test_of_averaged_state_dicts_the_updates_are_loaded():
    """In 16 bits the average of merged rows is not what the average update gives."""
    model = build_model(dtype=torch.bfloat16)
    loki.patch(model, ROWS)
    average = {key: tensor.float() for key, tensor in model.state_dict().items()}
    for _ in range(3):
        for key, tensor in train(model, 1).state_dict().items():
            average[key].mul_(0.9).add_(tensor.float(), alpha=0.1)
    again = build_model(dtype=torch.bfloat16)
    loki.patch(again, ROWS)
    with pytest.raises(RuntimeError, match="load the updates alone: "):
        again.load_state_dict(average)
    updates = {k: v for k, v in average.items() if k.endswith(("update", "delta_a", "delta_b"))}
    assert not again.load_state_dict(updates, strict=False).unexpected_keys
    train(again, 1)
