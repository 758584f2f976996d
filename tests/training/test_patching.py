from __future__ import annotations

import contextlib
import copy
import json
import operator
import re
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from transformers import AutoModelForCausalLM
from transformers.training_args import OptimizerNames

import loki_kernels as loki
from loki_kernels.tokenizing import find_tokenizer
from loki_kernels.training import patching, rows
from tests.architectures import llava
from tests.models import ARCHITECTURES, DEVICE, assert_unchanged, build_model, snapshot, to_device
from tests.tiny_training import (
    ROWS,
    WordTokenizer,
    load_model,
    logits,
    straight_and_resumed,
    tiny_trainer,
    token_batch,
    train,
)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trains_only_the_rows_and_unpatches(name, rank):
    model = build_model(name)
    model.lm_head.weight.requires_grad_(False) if hasattr(model, "lm_head") else None
    before = snapshot(model)
    want = logits(model)
    handle = loki.patch(model, ROWS, rank=rank)
    assert torch.equal(logits(model), want)
    assert handle.report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert list(handle.report.patched.values()) == [3, 1, 2]
    train(model)
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    own = {k for k in trained if k.rpartition(".")[2] in ("index", "update", "delta_a", "delta_b")}
    assert trained.keys() - own == before["weights"].keys()
    assert len(own) == 3 * (2 if rank is None else 3)
    names = list(handle.report.patched)
    for key in before["weights"]:
        tensor = trained[key]
        changed = (tensor != before["weights"][key]).nonzero()[:, :1].unique().tolist()
        layer = [i for i, n in enumerate(names) if key == f"{n}.weight"]
        assert changed == (sorted(ROWS[layer[0]]) if layer else []), key
    handle.unpatch()
    assert_unchanged(model, before)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("rank", [None, 2])
def test_merge_keeps_what_was_learned(model, rank):
    before = snapshot(model)
    handle = loki.patch(model, ROWS, rank=rank)
    learned = logits(train(model))
    merged = handle.merge()
    assert merged is model
    assert not any(isinstance(m, loki.LokiLinear) for m in model.modules())
    torch.testing.assert_close(logits(model), learned)
    after = snapshot(model)
    for key in ("required", "identity", "types", "hooks"):
        assert after[key] == before[key]
    with pytest.raises(RuntimeError, match="no longer patched"):
        handle.unpatch()


def test_context_manager(model):
    before = snapshot(model)
    with contextlib.suppress(ZeroDivisionError), loki.patch(model, ROWS):
        train(model)
        raise ZeroDivisionError
    assert_unchanged(model, before)
    with loki.patch(model, ROWS) as handle:
        train(model)
        handle.merge()
    assert not torch.equal(
        model.state_dict()["model.layers.0.mlp.down_proj.weight"],
        before["weights"]["model.layers.0.mlp.down_proj.weight"],
    )


def test_what_another_has_put_on_the_instance_comes_back(model):
    model.save_pretrained = own = lambda *_: None
    loki.patch(model, ROWS).unpatch()
    assert model.save_pretrained is own


def test_checkpoint_is_ordinary(tmp_path):
    """A plain process, on the CPU, that never imports loki_kernels gets the same logits."""
    model = build_model(device="cpu")
    loki.patch(model, ROWS)
    want = logits(train(model))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "loki_rows.update").exists()
    torch.save(want, tmp_path / "want.pt")
    script = f"""
        import sys, torch, transformers
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            {str(tmp_path)!r}, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        ids = torch.tensor([{token_batch()[0].tolist()}])
        want = torch.load({str(tmp_path / "want.pt")!r}, weights_only=True)
        assert torch.allclose(model.eval()(ids).logits, want, atol=1e-6)
        assert "loki_kernels" not in sys.modules
        print("same")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert result.stdout.strip() == "same", result.stderr
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    loki.patch(again, ROWS)
    torch.testing.assert_close(logits(again), want)


OPTIONS = [
    {},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"gradient_accumulation_steps": 2},
    {"bf16": True},
]


# The options act on steps; rows that are read before the first of them meet none.
@pytest.mark.parametrize(("by", "options"), [("rows", {}), *(("callback", o) for o in OPTIONS)])
def test_trainer_resumes_bit_exactly(tmp_path, options, by):
    def run(folder, resume=None):
        model = build_model("llama_mlp_bias")
        handle = loki.patch(model, resume if resume and by == "rows" else ROWS)
        callbacks = [handle.trainer_callback()] if by == "callback" else []
        run = tiny_trainer(model, folder, 6, callbacks, **options)
        run.train(resume_from_checkpoint=resume)
        return model.state_dict()

    straight, resumed = straight_and_resumed(run, tmp_path)
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name
    start = build_model("llama_mlp_bias").state_dict()["model.layers.0.mlp.down_proj.weight"]
    assert not torch.equal(straight["model.layers.0.mlp.down_proj.weight"][1], start[1])


@pytest.mark.parametrize("by", ["callback", "rows"])
@pytest.mark.parametrize("kind", ["shards", "elsewhere"])
def test_trainer_resumes_from(tmp_path, monkeypatch, by, kind):
    """A checkpoint in shards, and one that lies in another run's folder."""
    save = transformers.PreTrainedModel.save_pretrained
    if kind == "shards":
        monkeypatch.setattr(
            transformers.PreTrainedModel,
            "save_pretrained",
            lambda *given, **options: save(*given, **options | {"max_shard_size": "20KB"}),
        )
    folder = tmp_path / "a" / "checkpoint-3"

    def run(out, resume=None):
        model = build_model()
        handle = loki.patch(model, folder if resume and by == "rows" else ROWS)
        callbacks = [handle.trainer_callback()] if by == "callback" else []
        named = {"resume_from_checkpoint": str(resume)} if resume else {}
        tiny_trainer(model, out, 6, callbacks, **named).train(**named)
        return model.state_dict()

    straight = run(tmp_path / "a")
    assert kind != "shards" or len(list(folder.glob("model-*.safetensors"))) > 2
    resumed = run(tmp_path / ("a" if kind == "shards" else "b"), folder)
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize("by", ["callback", "rows"])
@pytest.mark.parametrize("rank", [None, 2])
def test_trainer_resumes_what_a_checkpoint_rounds(tmp_path, rank, by):
    def run(folder, resume=None):
        torch.manual_seed(3)
        model = build_model(dtype=torch.bfloat16)
        handle = loki.patch(model, resume if resume and by == "rows" else ROWS, rank=rank)
        callbacks = [handle.trainer_callback()] if by == "callback" else []
        tiny_trainer(model, folder, 6, callbacks).train(resume_from_checkpoint=resume)
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    straight, resumed = straight_and_resumed(run, tmp_path)
    assert straight
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize("rank", [None, 2])
def test_resuming_without_the_update_is_an_error(tmp_path, rank):
    def start(steps):
        torch.manual_seed(3)
        model = build_model(dtype=torch.bfloat16)
        loki.patch(model, ROWS, rank=rank)
        return tiny_trainer(model, tmp_path, steps)

    start(3).train()
    run = start(6)
    with pytest.raises(RuntimeError, match=r"handle\.trainer_callback\(\)"):
        run.train(resume_from_checkpoint=True)


def test_trainer_callback_reads_no_side_file_of_another_run(tmp_path):
    def patched():
        model = build_model(dtype=torch.bfloat16)
        return model, loki.patch(model, ROWS)

    model, _ = patched()
    tiny_trainer(model, tmp_path / "mine", 3).train()
    other, _ = patched()
    train(other)
    other.save_pretrained(tmp_path / "out" / "checkpoint-3")  # lies where the Trainer would look
    model, handle = patched()
    run = tiny_trainer(model, tmp_path / "out", 6, [handle.trainer_callback()])
    with pytest.raises(RuntimeError, match="TrainingArguments"):
        run.train(resume_from_checkpoint=str(tmp_path / "mine" / "checkpoint-3"))


def test_a_resumed_run_of_other_rows_is_refused(tmp_path):
    def start(rows, steps):
        model = build_model()
        handle = loki.patch(model, rows)
        return tiny_trainer(model, tmp_path, steps, [handle.trainer_callback()])

    start(ROWS, 3).train()
    run = start([[1, 5, 41], [0], [7, 3]], 6)
    with pytest.raises(RuntimeError, match="of the checkpoint's weights"):
        run.train(resume_from_checkpoint=True)


def test_assigned_state_dicts_stay_as_they_are(model):
    loki.patch(model, ROWS, rank=2)
    state = {k: v.clone() for k, v in train(model).state_dict().items()}
    before = {k: v.clone() for k, v in state.items()}
    again = build_model()
    loki.patch(again, ROWS, rank=2)
    again.load_state_dict(state, assign=True)
    assert all(torch.equal(state[k], v) for k, v in before.items())
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("rank", [None, 2])
def test_load_best_model_at_end(tmp_path, rank):
    model = build_model(dtype=torch.bfloat16)
    handle = loki.patch(model, ROWS, rank=rank)
    run = tiny_trainer(
        model, tmp_path, 6, [handle.trainer_callback()], load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    # the first checkpoint is the best
    losses = iter([1.0, 2.0])
    evaluate = run.evaluate
    run.evaluate = lambda *a, **k: (evaluate(*a, **k), {"eval_loss": next(losses)})[1]
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    again = loki.patch(build_model(dtype=torch.bfloat16), tmp_path / "checkpoint-3")
    for (_, a), (_, b) in zip(handle.named_layers(), again.named_layers(), strict=True):
        for (name, p), (_, q) in zip(a.trained_parameters(), b.trained_parameters(), strict=True):
            assert torch.equal(p, q), name
        assert torch.equal(a.merged_weight(), b.merged_weight())


def test_trainer_callback_finds_an_unwritable_output_before_training(tmp_path, monkeypatch):
    model = build_model()
    handle = loki.patch(model, ROWS)
    run = tiny_trainer(model, tmp_path / "out", 3, [handle.trainer_callback()])
    monkeypatch.setattr("os.access", lambda path, mode: False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(PermissionError, match="not writable"):
        run.train()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("rank", [None, 2])
def test_side_file_restores_what_the_checkpoint_rounds(tmp_path, rank):
    model = build_model(dtype=torch.bfloat16)
    handle = loki.patch(model, ROWS, rank=rank)
    train(model, lr=0.01)
    model.save_pretrained(tmp_path)
    again = build_model(dtype=torch.bfloat16)
    second = loki.patch(again, ROWS, rank=rank)
    second.load_state(tmp_path)
    for (_, a), (_, b) in zip(handle.named_layers(), second.named_layers(), strict=True):
        assert a.trained_parameters()
        for name, parameter in a.trained_parameters():
            assert torch.equal(parameter, getattr(b, name))
    assert torch.equal(logits(again), logits(model))

    other = build_model(dtype=torch.bfloat16)
    third = loki.patch(other, [[1], [2], [3]], rank=rank)
    with pytest.raises(ValueError, match="other rows"):
        third.load_state(tmp_path)
    with pytest.raises(FileNotFoundError):
        third.load_state(tmp_path / "elsewhere")
    handle.unpatch()
    assert "save_pretrained" not in model.__dict__


@pytest.mark.parametrize(
    ("rows", "rank", "said"),
    [
        (ROWS, 3, "another rank"),
        (ROWS, None, "another rank"),
        ([ROWS[0], [], ROWS[2]], 2, "rows of other layers"),
    ],
)
def test_an_update_of_another_shape_changes_nothing(tmp_path, rows, rank, said):
    model = build_model()
    loki.patch(model, ROWS, rank=2)
    train(model).save_pretrained(tmp_path)
    again = build_model()
    handle = loki.patch(again, rows, rank=rank)
    before = {name: p.clone() for name, p in again.named_parameters()}
    with pytest.raises(ValueError, match=f"patched otherwise.*{said}"):
        handle.load_state(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.float32, "have other values"), (torch.float16, "copies of one model differ by less")],
)
def test_an_update_fits_the_base_in_another_dtype(tmp_path, dtype, said):
    model = build_model(dtype=torch.bfloat16)
    handle = loki.patch(model, ROWS)
    train(model)
    model.save_pretrained(tmp_path)
    again = build_model(dtype=torch.bfloat16).to(dtype)
    second = loki.patch(again, tmp_path)
    for (_, a), (_, b) in zip(handle.named_layers(), second.named_layers(), strict=True):
        assert torch.equal(a.update, b.update)
    other = build_model(dtype=dtype)
    for parameter in other.parameters():
        parameter.data.normal_()
    before = snapshot(other)
    with pytest.raises(ValueError, match=said):
        loki.patch(other, tmp_path)
    assert_unchanged(other, before)


def test_empty_layers_are_skipped(model):
    report = loki.patch(model, [[1], [], [2]]).report
    assert list(report.skipped) == ["model.layers.1.mlp.down_proj"]
    assert "no row" in str(report)


def test_row_file(model, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    handle = loki.patch(model, path)
    assert handle.rows == loki.RowSelection(ROWS)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([[1], [2]], {}, "2 layers, the model 3"),
        ([[48], [1], [1]], {}, "row 48 of layer 0 is out of range"),
        ([[-1], [1], [1]], {}, "-1"),
        ([[1, 1], [1], [1]], {}, "row 1 twice"),
        ([[], [], []], {}, "empty in every layer"),
        (ROWS, {"rank": 0}, "rank"),
        (ROWS, {"modules_to_save": ["nowhere"]}, "which the model lacks"),
        (ROWS, {"modules_to_save": ["mlp"]}, "its rows are trained"),
        (ROWS, {"modules_to_save": "lm_head"}, "must be a list"),
        (None, {"quota": 0}, "quota"),
        (None, {"quota": 101}, "quota"),
        (None, {}, "pass tokenizer="),
    ],
)
def test_bad_input_changes_nothing(model, rows, options, message):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        loki.patch(model, rows, **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("step", ["_replace_module", "_replace_mlp", "_attach", "logger.info"])
def test_a_failure_in_the_middle_changes_nothing(model, monkeypatch, step):
    """Of the last layer, or right at the end: as when memory runs out, or of Ctrl-C."""
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    step_itself = operator.attrgetter(step)(patching)
    calls = []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == (3 if "replace" in step else 1):
            raise KeyboardInterrupt
        return step_itself(*arguments, **options)

    monkeypatch.setattr(f"loki_kernels.training.patching.{step}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loki.patch(model, ROWS, fuse_mlp=True)
    assert_unchanged(model, before)
    assert not model.model._forward_hooks
    assert "save_pretrained" not in model.__dict__


def test_damaged_row_file(model, tmp_path):
    before = snapshot(model)
    path = tmp_path / "rows.json"
    path.write_text("[[1, 2")
    with pytest.raises(ValueError, match="not a row file"):
        loki.patch(model, path)
    assert_unchanged(model, before)


def test_patching_twice(model):
    handle = loki.patch(model, ROWS)
    before = snapshot(model)
    with pytest.raises(ValueError, match="already patched"):
        loki.patch(model, ROWS)
    assert_unchanged(model, before)
    handle.unpatch()
    loki.patch(model, ROWS).unpatch()


def test_selection_of_neurons_or_another_width(model, prompts):
    neurons = loki.attribute(model, prompts, site="ffn_neurons")
    with pytest.raises(ValueError, match="ffn_neurons"):
        loki.patch(model, loki.select(neurons))
    wide = loki.select(torch.randn(2, 3, 64), 1.0)
    with pytest.raises(ValueError, match="hidden_size 64"):
        loki.patch(model, wide)


@pytest.mark.parametrize("name", ["llama", "llama_mlp_bias"])
def test_suppress(name):
    model = build_model(name)
    before = snapshot(model)
    with loki.suppress(model, ROWS):
        down_proj = model.model.layers[0].mlp.down_proj
        assert not down_proj(to_device(torch.randn(2, 112)))[:, ROWS[0]].any()
        kept = [r for r in range(48) if r not in ROWS[0]]
        weights = before["weights"]["model.layers.0.mlp.down_proj.weight"]
        assert torch.equal(down_proj.weight[kept], weights[kept])
    assert_unchanged(model, before)


def test_a_layer_whose_weight_is_read_alone_is_refused(monkeypatch):
    """Its update would get no gradient, and beside other modules none would miss it."""
    monkeypatch.setattr("loki_kernels.training.writer._has_compiled", lambda: False)  # other tests
    config = transformers.BloomConfig(
        vocab_size=97, hidden_size=48, n_layer=3, n_head=4, pretraining_tp=2, slow_but_exact=True
    )
    model, ids = transformers.BloomForCausalLM(config).to(DEVICE), token_batch()
    loki.patch(model, ROWS, modules_to_save=["ln_f"])
    with pytest.raises(RuntimeError, match=r"h\.0\.mlp\.dense_4h_to_h is read, and it is not call"):
        model.train()(input_ids=ids, labels=ids)
    assert not any(module.mlp._forward_hooks for module in model.transformer.h)


@pytest.mark.parametrize("fuse_mlp", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_a_pass_does_not_reach_is_none_that_is_read_alone(
    model, fuse_mlp, checkpointing, monkeypatch
):
    handle, ids = loki.patch(model, ROWS, fuse_mlp=fuse_mlp), token_batch()
    if checkpointing:
        model.gradient_checkpointing_enable()
    skipped = model.model.layers[1]
    monkeypatch.setattr(type(skipped), "forward", skip(skipped, type(skipped).forward))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = [layer.update.grad is not None for _, layer in handle.named_layers()]
    assert trained == [True, False, True]
    assert not any(layer.mlp._forward_hooks for layer in model.model.layers)


def test_a_layer_that_compiled_code_calls_is_none_that_is_read_alone(model):
    """Where a forward pass alone is compiled, which the module does not show."""
    loki.patch(model, ROWS)
    for layer in model.model.layers:
        layer.mlp.forward = torch.compile(layer.mlp.forward, backend="eager")
    model.train()(input_ids=token_batch()).logits.sum().backward()


def skip(skipped, forward):
    """Of a class, a forward pass that leaves one of its modules out, as LayerDrop does."""

    def without(self, hidden, *arguments, **options):
        return hidden if self is skipped else forward(self, hidden, *arguments, **options)

    return without


def test_no_backward_pass_crosses_the_edge_of_suppress(model):
    """It would multiply by rows that its forward pass has not seen, and say nothing."""
    ids = token_batch()
    before = model(input_ids=ids, labels=ids).loss
    with loki.suppress(model, ROWS):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            before.backward()
        model(input_ids=ids, labels=ids).loss.backward()
        inside = model(input_ids=ids, labels=ids).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize(("end", "rank"), [("unpatch", None), ("merge", 2)])
def test_no_backward_pass_sees_other_rows_after_the_end(model, end, rank):
    handle, ids = loki.patch(model, ROWS, rank=rank), token_batch()
    loss = model(input_ids=ids, labels=ids).loss
    getattr(handle, end)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_three_lines(model, tmp_path, monkeypatch):
    """`patch(model, tokenizer=..., quota=...)` analyses, selects, and keeps the analysis."""
    monkeypatch.setenv("LOKI_KERNELS_CACHE", str(tmp_path / "cache"))
    handle = loki.patch(model, tokenizer=WordTokenizer(), quota=25)
    assert handle.rows.counts == [12, 12, 12]
    tokenizer = WordTokenizer()
    questions = [q.prompt(tokenizer) for q in loki.load_questions(3)]
    handle.unpatch()
    want = loki.select(loki.attribute(model, questions, tokenizer=tokenizer), 25)
    assert handle.rows == want

    class Analysed(Exception):
        pass

    def analyse_again(*_, **__):
        raise Analysed

    monkeypatch.setattr("loki_kernels.attribution.analysis.attribute", analyse_again)
    again = loki.patch(model, tokenizer=tokenizer, quota=25)
    assert again.rows == want
    again.unpatch()
    model.config.rms_norm_eps *= 10  # the same weights, another function
    with pytest.raises(Analysed):
        loki.patch(model, tokenizer=tokenizer, quota=25)
    model.config.rms_norm_eps /= 10
    assert loki.patch(model, tokenizer=tokenizer, quota=25).unpatch() is model
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(Analysed):
        loki.patch(model, tokenizer=tokenizer, quota=25)


def test_generation_of_a_patched_model(model):
    ids = token_batch()
    want = model.generate(ids, max_new_tokens=5, do_sample=False)
    with loki.patch(model, ROWS):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), want)


def test_plain_llama_structure_is_kept(model, tmp_path):
    loki.patch(model, ROWS)
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["LlamaForCausalLM"]
    assert not hasattr(config, "auto_map")


@pytest.mark.parametrize("call", ["load_state", "inference", "trainer_callback"])
def test_a_handle_does_nothing_once_it_is_undone(model, tmp_path, call):
    handle = loki.patch(model, ROWS)
    model.save_pretrained(tmp_path)
    handle.unpatch()
    with pytest.raises(RuntimeError, match="no longer patched"):
        getattr(handle, call)(*([tmp_path] if call == "load_state" else []))


def test_data_parallel_is_refused(model):
    loki.patch(model, ROWS)
    replica = model.model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES"):
        replica(input_ids=token_batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "step"), [(None, 2e-5), (None, 1e-9), (2, 0.01), (2, 1e-9)])
def test_steps_below_the_rounding_are_told_apart(tmp_path, dtype, rank, step):
    """Of two checkpoints that differ by less than 16 bits resolve, or not at all as merged."""
    model = build_model(dtype=dtype)
    handle = loki.patch(model, ROWS, rank=rank)
    train(model, lr=1e-3)
    model.save_pretrained(tmp_path)
    want = {name: tensor.clone() for name, tensor in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in handle.named_layers():
            factor = layer.trained_parameters()[-1][1]
            factor.add_(to_device(step * torch.randn(factor.shape, generator=generator)))
    merged = safetensors.torch.load_file(tmp_path / "model.safetensors")
    model.load_state_dict(merged, strict=False)
    if step > 1e-8:
        with pytest.raises(RuntimeError, match="not the update itself"):
            train(model.train())
    handle.trainer_callback()._load_side_file([tmp_path])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, want[name]), name
    train(model.train(), steps=1)


@pytest.mark.parametrize("rank", [None, 2])
def test_merge_side_file(tmp_path, rank):
    model = build_model(dtype=torch.bfloat16)
    loki.patch(model, [[1, 5], [], [2]], rank=rank)
    train(model, lr=0.01)
    model.save_pretrained(tmp_path)
    merged = loki.load_adapter(build_model(dtype=torch.bfloat16), tmp_path).merge().state_dict()
    saved = model.state_dict()
    for name, tensor in merged.items():
        assert torch.equal(saved[name], tensor), name
    with pytest.raises(ValueError, match="which the model lacks"):
        loki.load_adapter(build_model("gpt_neox"), tmp_path)


@pytest.mark.parametrize("rank", [None, 2])
def test_an_update_is_not_added_twice(tmp_path, rank):
    """A saved folder holds the merged rows and the update: the update goes onto the base."""
    model = build_model()
    loki.patch(model, ROWS, rank=rank)
    train(model).save_pretrained(tmp_path)
    merged = load_model(tmp_path)
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    with pytest.raises(ValueError, match="have other values in this model"):
        loki.load_adapter(merged, tmp_path)
    handle = loki.patch(merged, ROWS, rank=rank)
    with pytest.raises(ValueError, match="have other values in this model"):
        handle.load_state(tmp_path)
    for name, tensor in handle.unpatch().state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("dtype", "share", "said"),
    [
        (torch.bfloat16, 0.05, "have other values"),
        (torch.bfloat16, 0.005, "have other values"),  # of one fingerprint in both dtypes
        (torch.float16, 0.05, "copies of one model differ by less than 1%"),
    ],
)
def test_an_update_is_not_added_twice_in_another_dtype(model, tmp_path, dtype, share, said):
    """Rows that were moved by a twentieth are no rounding of the base's."""
    handle = loki.patch(model, ROWS)
    with torch.no_grad():
        for _, layer in handle.named_layers():
            layer.update.copy_(share * layer.base_rows)
    model.save_pretrained(tmp_path)
    merged = load_model(tmp_path, dtype=dtype)
    before = snapshot(merged)
    with pytest.raises(ValueError, match=said):
        loki.load_adapter(merged, tmp_path)
    assert_unchanged(merged, before)


def test_a_new_head_is_trained_and_others_on_demand(model):
    config = model.config
    classifier = transformers.LlamaForSequenceClassification(config).to(DEVICE)
    handle = loki.patch(classifier, ROWS)
    assert handle.report.whole == {"score": "float32"}
    trained = {n for n, p in classifier.named_parameters() if p.requires_grad}
    assert trained == {"score.weight"} | {f"{n}.update" for n, _ in handle.named_layers()}
    assert "score is trained whole" in str(handle.report)
    handle.unpatch()
    handle = loki.patch(model, ROWS, modules_to_save=["embed_tokens"])
    assert model.model.embed_tokens.weight.requires_grad
    assert not model.model.norm.weight.requires_grad
    train(model)


@pytest.mark.parametrize("rank", [None, 2])
def test_going_on_with_another_rank_is_refused(model, tmp_path, rank):
    """The update has a rank of its own, which would be trained in place of the one asked for."""
    with loki.patch(model, ROWS, rank=rank):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"of {'no ' if rank is None else ''}rank.*rank=4 would"):
        loki.patch(model, tmp_path, rank=4)
    with loki.patch(model, tmp_path, rank=rank) as handle:
        assert {layer.rank for _, layer in handle.named_layers()} == {rank}


def test_nobody_is_asked_whether_a_model_s_own_code_may_run(model, tmp_path, monkeypatch):
    """Of a model that was loaded with trust_remote_code=True transformers asks a terminal, 15 s."""
    asked = []
    monkeypatch.setattr("builtins.input", asked.append)
    kinds = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]}
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "own", "auto_map": kinds}))
    model.name_or_path = str(tmp_path)
    with loki.patch(model, ROWS) as handle:
        assert handle.report.notes == []
    with pytest.raises(ValueError, match="no tokenizer was found"):
        find_tokenizer(model)
    assert not asked


def test_new_tokens_that_stay_frozen_are_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    grown = load_model(tmp_path)
    size = grown.get_input_embeddings().weight.shape[0]
    grown.resize_token_embeddings(size + 2)
    with loki.patch(grown, ROWS) as handle:
        assert handle.report.notes == [
            f"the embeddings of tokens {size} to {size + 1} are new and frozen; modules_to_save "
            "names what to train"
        ]
    with loki.patch(grown, ROWS, modules_to_save=["embed_tokens"]) as handle:
        assert handle.report.notes == []


def test_tokens_that_are_added_after_patching_are_refused(model):
    """The embedding was frozen, and its new rows would be too."""
    batch = token_batch()
    size = model.get_input_embeddings().weight.shape[0]
    for trained in ([], ["embed_tokens"]):
        with loki.patch(model, ROWS, modules_to_save=trained):
            model.train().resize_token_embeddings(size + 2)
            if trained:
                train(model, steps=1)
            else:
                with pytest.raises(RuntimeError, match=f"tokens {size} to {size + 1} were added"):
                    model(input_ids=batch, labels=batch)
                model.eval()(input_ids=batch)
            model.resize_token_embeddings(size)
            train(model.train(), steps=1)


def test_hooks_on_what_is_replaced_go_on(model):
    seen = []
    down_proj = model.model.layers[0].mlp.down_proj
    early = down_proj.register_forward_hook(lambda *_: seen.append("early"))
    handle = loki.patch(model, ROWS)
    logits(model)
    assert seen == ["early"]
    late = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda *_: seen.append("late")
    )
    early.remove()
    logits(model)
    assert seen == ["early", "late"]
    handle.unpatch()
    logits(model)
    assert seen == ["early", "late", "late"]
    late.remove()
    logits(model)
    assert seen == ["early", "late", "late"]


def test_a_forward_of_its_own_is_named(model):
    down_proj = model.model.layers[1].mlp.down_proj
    down_proj.forward = type(down_proj).forward.__get__(down_proj)
    with loki.patch(model, ROWS) as handle:
        assert handle.report.notes == [
            "1 of the down-projections (model.layers.1.mlp.down_proj, ...) had a forward of their "
            "own, which is not called while the model is patched"
        ]


@pytest.fixture
def writes(monkeypatch):
    """How many layers each launch of sync_rows wrote."""
    launches = []
    real = rows.sync_rows

    def sync_rows(weights, *args, **options):
        launches.append(len(weights))
        return real(weights, *args, **options)

    monkeypatch.setattr(rows, "sync_rows", sync_rows)
    return launches


def test_rows_of_all_layers_are_written_in_one_launch(model, writes):
    loki.patch(model, ROWS)
    logits(model)
    assert writes == [3]
    model.model(input_ids=token_batch())  # the decoder by itself
    assert writes == [3, 3]


@pytest.mark.parametrize("rank", [None, 3])
def test_the_report_counts_what_training_takes(rank):
    """As the tensors say."""
    model = build_model()
    texts = [list(range(3, 60)), list(range(70, 5, -1))]
    protection = loki.estimate_protection(model, texts, max_directions=8)
    handle = loki.patch(model, ROWS, rank=rank, protect=protection)
    layers = [layer for _, layer in handle.named_layers()]
    trained = sum(p.nbytes for layer in layers for _, p in layer.trained_parameters())
    assert handle.report.memory.update == 4 * trained
    assert handle.report.memory.base == sum(layer.base_rows.nbytes for layer in layers)
    assert handle.report.memory.directions == sum(layer.directions.nbytes for layer in layers)


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (10**9, None),
        (200_000, "training 100 % of the rows takes 0.0 GB .* quota=50, protect=True takes"),
        (0, "has 0.0 GB for it$"),
    ],
)
def test_too_little_memory_is_said_before_anything_is_estimated(free, said, monkeypatch, caplog):
    device = torch.device("cuda", 0)
    model = build_model(device="cpu")
    own = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr("loki_kernels.memory.accelerator", lambda: (device, own + free))
    monkeypatch.setattr(patching, "protection_to_keep", lambda *_: pytest.fail("estimated"))
    with caplog.at_level("WARNING"), pytest.raises(pytest.fail.Exception):
        loki.patch(model)
    found = [record.getMessage() for record in caplog.records]
    assert not found if said is None else re.search(said, found[0])


def test_a_layer_by_itself_writes_its_rows(model, writes):
    loki.patch(model, ROWS)
    layer = model.model.layers[0].mlp.down_proj
    layer.update.data.copy_(-layer.base_rows)
    assert not layer(to_device(torch.ones(1, 112)))[0, [1, 5, 40]].any()
    assert writes == [1]


def test_rows_are_written_once_for_accumulated_batches(writes, tmp_path):
    """The callback knows that no step was taken; every step, and an evaluation, writes them."""
    states = []
    for known in (False, True):
        model = build_model()
        handle = loki.patch(model, ROWS)
        callbacks = [handle.trainer_callback()] if known else []
        trainer = tiny_trainer(
            model, tmp_path, 2, callbacks, gradient_accumulation_steps=3, save_strategy="no",
            per_device_eval_batch_size=1,
        )  # fmt: skip
        del writes[:]
        trainer.train()
        assert len(writes) == (2 if known else 6)
        del writes[:]
        trainer.evaluate()
        assert len(writes) == (1 if known else 4)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize(
    "between",
    ["on_step_begin", "on_step_end", "on_evaluate", "on_predict", "adalomo", "a change"],
)
def test_rows_that_may_have_changed_are_written(between, writes):
    model = build_model()
    handle = loki.patch(model, ROWS)
    train(model)
    callback = handle.trainer_callback()
    logits(model)
    optim = OptimizerNames.ADALOMO if between == "adalomo" else OptimizerNames.ADAMW_TORCH
    callback.on_substep_end(SimpleNamespace(optim=optim), None, None)
    if between == "a change":
        with torch.no_grad():
            handle.named_layers()[0][1].update.add_(1.0)
    elif between != "adalomo":
        getattr(callback, between)(None, None, None)
    del writes[:]
    logits(model)
    assert len(writes) == 1


def test_inference_writes_once(model, writes):
    handle = loki.patch(model, ROWS)
    train(model)
    ids = token_batch()
    want = model.generate(ids, max_new_tokens=5, do_sample=False)
    writes.clear()
    with handle.inference():
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), want)
        assert writes == [3]
        with pytest.raises(RuntimeError, match="leave it first"):
            train(model.train())
    train(model)
    assert len(writes) > 1


def test_the_index_of_shards_counts_the_models_own_parameters(model, tmp_path):
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    loki.patch(model, ROWS)
    model.save_pretrained(tmp_path / "trained", max_shard_size="20KB")
    read = [
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text())["metadata"]
        for name in ("base", "trained")
    ]
    assert read[0] == read[1]


def test_a_config_alone_is_no_tokenizer(tmp_path):
    """Of Qwen's transformers makes one that knows a single token, without a word."""
    config = transformers.Qwen2Config(
        hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=97,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    with pytest.raises(ValueError, match="has no file of a tokenizer"):
        find_tokenizer(loaded)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("what", ["generate", "save"])
def test_a_weight_that_held_the_base_holds_it_again(what, trained, model, tmp_path):
    """Compiled training never writes: a written weight would have later steps compiled anew."""
    handle = loki.patch(model, ROWS)
    layers = [layer for _, layer in handle.named_layers()]
    if trained:
        train(model)
    else:
        with torch.no_grad():
            for layer in layers:
                layer.update.normal_()
    before = {name: p.clone() for name, p in model.named_parameters()}
    if what == "generate":
        model.generate(token_batch(), max_new_tokens=2, do_sample=False)
    else:
        model.save_pretrained(tmp_path)
    assert [layer.written for layer in layers] == [trained] * len(layers)
    for name, parameter in model.named_parameters():
        if not (trained and name.endswith("down_proj.weight")):  # of the last step's update there
            assert torch.equal(parameter, before[name])
    handle.trainer_callback().on_prediction_step()  # nothing was trained, and the rows are the base
    got = logits(model)
    assert torch.equal(got, logits(handle.merge()))


@pytest.mark.parametrize("graded", [False, True])
def test_inference_runs_what_is_merged_of_a_rank_too(graded):
    """In bfloat16 a product of factors is rounded elsewhere than the rows that are saved."""
    model = build_model(dtype=torch.bfloat16)
    handle = loki.patch(model, ROWS, rank=2)
    train(model, lr=0.01)
    model.eval()
    base = {name: p.clone() for name, p in model.named_parameters()}
    ids = token_batch()
    with handle.inference(), torch.set_grad_enabled(graded):
        got = model(input_ids=ids).logits.detach()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())
    handle.merge()
    with torch.no_grad():
        want = model(input_ids=ids).logits
    close = {"rtol": 2e-2, "atol": 2e-2} if graded else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(got, want, **close)


def test_a_frozen_weight_that_is_to_be_trained_is_an_error(model):
    """Its gradient would be None, and the file beside the checkpoint would name it."""
    loki.patch(model, ROWS)
    model.model.layers[1].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"down_proj.weight was asked for a gradient"):
        train(model)


@pytest.mark.parametrize("training", [True, False])
def test_what_is_asked_of_training_is_asked_in_either_mode(training, model, caplog):
    loki.patch(model, ROWS)
    model.to(torch.bfloat16).train(training)
    ids = token_batch()
    with torch.no_grad():
        model(input_ids=ids)
    assert "rounded away" not in caplog.text
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    assert caplog.text.count("rounded away") == 1


def test_an_error_leaves_inference(model):
    handle = loki.patch(model, ROWS)
    with pytest.raises(ZeroDivisionError), handle.inference():
        raise ZeroDivisionError
    untrained = logits(model)
    learned = logits(train(model.train()))
    assert not torch.equal(learned, untrained)
    torch.testing.assert_close(logits(handle.merge()), learned)


def test_rows_are_written_after_a_forward_pass_that_raised(model):
    loki.patch(model, ROWS)
    broken = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    broken.remove()
    layer = model.model.layers[2].mlp.down_proj
    layer.update.data.copy_(-layer.base_rows)
    assert not layer(to_device(torch.ones(1, 112)))[0, [7, 3]].any()


def test_a_copy_writes_its_own_rows(model):
    loki.patch(model, ROWS)
    twin = copy.deepcopy(model)
    layer = twin.model.layers[0].mlp.down_proj
    layer.update.data.copy_(-layer.base_rows)
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    logits(twin)
    assert not layer.weight[[1, 5, 40]].any()
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)


def test_a_handles_copy_leaves_this_model_alone(model, tmp_path):
    """Its merge() would take this one apart; what holds a handle is copied for an average."""
    module = torch.nn.Module()
    module.model, module.handle = model, loki.patch(model, ROWS)
    train(model)
    copied = copy.deepcopy(module)
    assert copied.handle.model is copied.model
    for call in (copied.handle.merge, copied.handle.unpatch, copied.handle.trainer_callback):
        with pytest.raises(RuntimeError, match="a copy of its handle"):
            call()
    want = logits(train(copied.model))
    loki.save_adapter(copied.model, tmp_path)
    base = module.handle.unpatch()
    torch.testing.assert_close(logits(loki.load_adapter(base, tmp_path).model), want)


def test_an_offloaded_model_is_refused(model):
    from accelerate import cpu_offload

    cpu_offload(model)
    with pytest.raises(loki.UnsupportedModelError, match="down_proj is not in memory"):
        loki.patch(model, ROWS)


@pytest.mark.parametrize("rank", [None, 2])
def test_offloading_a_patched_model_is_refused(model, rank, tmp_path):
    """accelerate brings a weight in for its layer alone, and the rows are written before; of LoKI*
    it would train copies of the factors."""
    from accelerate import cpu_offload

    handle = loki.patch(model, ROWS, rank=rank)
    cpu_offload(model)

    def held():
        with handle.inference():
            pass

    def saved():
        model.save_pretrained(tmp_path)

    for call in (lambda: logits(model), held, saved, handle.merge):
        with pytest.raises(loki.UnsupportedModelError, match="before you offload"):
            call()
    assert not list(tmp_path.iterdir())


def test_hooks_go_with_the_patch(model):
    decoder = model.model
    handle = loki.patch(model, ROWS)
    assert decoder._forward_pre_hooks
    assert decoder._forward_hooks
    assert model._ddp_params_and_buffers_to_ignore
    handle.unpatch()
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    assert not decoder._forward_pre_hooks
    assert not decoder._forward_hooks


def test_a_copy_saves_itself(model, tmp_path):
    loki.patch(model, ROWS, rank=2)
    twin = copy.deepcopy(model)
    train(twin)
    twin.save_pretrained(tmp_path / "twin")
    model.save_pretrained(tmp_path / "model")
    merged = loki.load_adapter(build_model(), tmp_path / "twin").merge().state_dict()
    untrained = loki.load_adapter(build_model(), tmp_path / "model").merge().state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(merged[name], twin.state_dict()[name])
    assert not torch.equal(merged[name], untrained[name])


def test_a_patched_model_can_be_pickled(model, tmp_path):
    """torch.save of whole models, and processes that are spawned with one."""
    for options in ({}, {"rank": 2}):
        handle = loki.patch(model, ROWS, **options)
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(logits(loaded), logits(model))
        handle.unpatch()


@pytest.mark.parametrize("protected", [False, True])
def test_parameters_that_are_cast_alone(protected):
    """DeepSpeed's bfloat16 engine leaves buffers as they are."""
    model = build_model()
    protect = loki.estimate_protection(model, [range(60)] * 8) if protected else None
    handle = loki.patch(model, ROWS, protect=protect)
    base = snapshot(model)["weights"]
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    train(model)
    for name, layer in handle.named_layers():
        want = base[f"{name}.weight"].clone()
        want[layer.index] += layer.formed_update()["update"].float()
        torch.testing.assert_close(layer.merged_weight(), want.bfloat16(), rtol=1e-2, atol=1e-3)
        assert layer.update.abs().max() > 0.01
    trained = logits(model)
    handle.merge()
    torch.testing.assert_close(logits(model), trained)


def test_resuming_in_a_wider_dtype(tmp_path):
    """A checkpoint's rows are bfloat16's then, in float32 tensors."""
    model = build_model(dtype=torch.bfloat16)
    tiny_trainer(model, tmp_path, 3, [loki.patch(model, ROWS).trainer_callback()]).train()
    wide = build_model(dtype=torch.bfloat16).float()
    handle = loki.patch(wide, ROWS)
    folder = tmp_path / "checkpoint-3"
    wide.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"), strict=False)
    handle.trainer_callback()._load_side_file([folder])
    saved = loki.patch(build_model(dtype=torch.bfloat16), folder)
    for (_, a), (_, b) in zip(handle.named_layers(), saved.named_layers(), strict=True):
        assert torch.equal(a.update, b.update)


def test_an_interrupted_step_is_none(model):
    """torch calls no hook after KeyboardInterrupt."""
    handle = loki.patch(model, ROWS)
    train(model)
    texts = [{"input_ids": list(range(20))}]
    want = loki.drift(handle, texts=texts).overall.kl

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model)
    hook.remove()
    assert loki.drift(handle, texts=texts).overall.kl == want > 0
    with handle.inference(), pytest.raises(ValueError, match="leave it first"):
        loki.limit_drift(handle, 0.1, texts)


@pytest.mark.parametrize("offload", [False, True])
def test_checkpoint_wrappers_around_the_layers(offload, model, tmp_path):
    """What accelerate's ``activation_checkpointing`` and its ``_offload`` do to a patched model."""
    names = [name for name, _ in model.named_parameters()]
    handle = loki.patch(model, ROWS, modules_to_save=["layers.2.input_layernorm"])
    train(model)
    want = logits(model)
    for i, layer in enumerate(model.model.layers):
        wrapped = checkpoint_wrapper(layer)
        model.model.layers[i] = offload_wrapper(wrapped) if offload else wrapped
    assert [name for name, _ in handle.merged_parameters()] == names
    model.load_state_dict(dict(handle.merged_parameters()), strict=False)
    loki.save_adapter(model, tmp_path / "adapter")
    loki.export_lora(model, tmp_path / "lora")
    other = build_model()
    loki.load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(logits(other), want)


def test_an_update_that_is_cast_is_named(caplog):
    model = build_model(dtype=torch.bfloat16)
    loki.patch(model, ROWS)
    train(model, steps=2)
    assert "rounded away" not in caplog.text
    model = build_model()
    loki.patch(model, ROWS)
    train(model.train().to(torch.bfloat16), steps=2)
    assert caplog.text.count("rounded away") == 1
    model = build_model()
    loki.patch(model, ROWS)
    train(model.train())
    train(model.to(torch.bfloat16))  # as an evaluation in bfloat16 leaves it
    assert caplog.text.count("rounded away") == 2


def test_a_bare_decoder_has_no_new_head():
    """An embedding model: nothing beside the decoder."""
    model = build_model().model
    handle = loki.patch(model, ROWS)
    model(input_ids=token_batch()).last_hidden_state.sum().backward()
    assert all(layer.update.grad.abs().sum() > 0 for _, layer in handle.named_layers())


def test_a_bare_model_of_images_has_no_new_head():
    """Beside its decoder lies the tower, which is none."""
    model = llava().model
    handle = loki.patch(model, ROWS)
    assert handle.report.whole == {}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.update" for name, _ in handle.named_layers()}


@pytest.mark.parametrize("way", ["patch", "load_adapter"])
def test_parameters_that_are_enabled_by_hand_come_back(way, tmp_path):
    """Among them one in the module of all layers, as LLaVA-NeXT's image_newline, and a bias."""
    model = llava()
    model.save_pretrained(tmp_path / "base")
    base = llava()
    base.load_state_dict(model.state_dict())
    for each in (model, base):
        each.model.register_parameter("newline", torch.nn.Parameter(torch.ones(4, device=DEVICE)))
    names = ["model.newline", "model.multi_modal_projector.linear_1.bias"]
    names += [f"model.multi_modal_projector.linear_2.{part}" for part in ("weight", "bias")]
    loki.patch(model, ROWS)
    for name in names:
        model.get_parameter(name).requires_grad_(True).data.add_(1)
    train(model)
    if way == "patch":
        model.save_pretrained(tmp_path / "saved")
        handle = loki.patch(base, tmp_path / "saved")
    else:
        loki.save_adapter(model, tmp_path / "saved")
        config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
        assert config["modules_to_save"] == ["model.multi_modal_projector.linear_2"]
        handle = loki.load_adapter(base, tmp_path / "saved")
    trained = {n for n, p in base.named_parameters() if p.requires_grad}
    assert trained == {*names, *(f"{name}.update" for name, _ in handle.named_layers())}
    whole = [*names[:2], "model.multi_modal_projector.linear_2"]
    assert handle.report.whole == dict.fromkeys(whole, "float32")
    for name in names:
        assert torch.equal(base.get_parameter(name), model.get_parameter(name))
    torch.testing.assert_close(logits(base), logits(model))


def test_a_forward_pass_of_another_program_is_refused(model):
    """It would read the base's weight, as a fused kernel's does, and no update."""
    want = logits(loki.patch(model, ROWS).model)
    layer = model.model.layers[1].mlp.down_proj

    def fused(self, x):
        return torch.nn.functional.linear(x, self.weight)

    for mode in (model.train, model.eval):
        mode()
        layer.forward = fused.__get__(layer)
        with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down_proj by .*fused"):
            model(token_batch())
        del layer.forward
    torch.testing.assert_close(logits(model), want)


def test_a_forward_pass_that_is_wrapped_runs(model):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    want = logits(loki.patch(model, ROWS).model)
    layers = [layer.mlp.down_proj for layer in model.model.layers]
    for layer in layers:
        add_hook_to_module(layer, ModelHook())
    assert "forward" in layers[0].__dict__
    assert torch.equal(logits(model), want)
    for layer in layers:
        remove_hook_from_module(layer)
        layer.compile(backend="eager")
    assert "forward" in layers[0].__dict__  # accelerate leaves the layer's own method there
    assert torch.equal(logits(model), want)
