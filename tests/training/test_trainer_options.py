"""Options of HF Trainer that reach into the model, around a patched model and a PEFT adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import TrainerCallback

import loki_kernels as loki
from tests.models import DEVICE
from tests.tiny_training import (
    ROWS,
    WAYS,
    assert_ordinary,
    load_model,
    start,
    straight_and_resumed,
    tiny_trainer,
)
from tests.zoo.build import build

STEPS = 3


def updates(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "update" in n}


@pytest.fixture(scope="module", params=WAYS)
def plain(request, base_folder, tmp_path_factory):
    """(way, the update after training with no option)."""
    model, callbacks = start(request.param, base_folder)
    tiny_trainer(model, tmp_path_factory.mktemp("plain"), STEPS, callbacks).train()
    return request.param, updates(model)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["use_reentrant=True", "use_reentrant=False", "torch_compile"],
)
def test_options_that_change_no_number(plain, base_folder, tmp_path, options):
    way, want = plain
    torch._dynamo.reset()
    model, callbacks = start(way, base_folder)
    trainer = tiny_trainer(model, tmp_path, STEPS, callbacks, **options)
    trainer.train()
    for name, update in updates(model).items():
        torch.testing.assert_close(update, want[name], rtol=1e-3, atol=1e-5, msg=name)
    trainer.save_model(str(tmp_path / "out"))
    assert_ordinary(way, tmp_path / "out", base_folder)
    assert_ordinary(way, tmp_path / f"checkpoint-{STEPS}", base_folder)


@pytest.mark.parametrize("regional", [False, True])
def test_an_evaluation_leaves_compiled_steps_the_base(regional, base_folder, tmp_path, monkeypatch):
    """It runs the model as it was before, which writes the rows: steps would be compiled anew, and
    keep the update for the backward pass. A decoder whose layers are compiled writes by itself."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(regional))
    torch._dynamo.reset()
    model, callbacks = start("patch", base_folder)
    written = {"step": [], "evaluation": []}

    def hold_update():
        layers = (m for m in model.modules() if isinstance(m, loki.LokiLinear))
        return [layer.written for layer in layers]

    class Look(TrainerCallback):
        def on_step_begin(self, *_, **__):
            written["step"].append(hold_update())

        def on_evaluate(self, *_, **__):
            written["evaluation"].append(hold_update())

    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    evaluate = {"eval_strategy": "steps", "eval_steps": 1}
    tiny_trainer(model, tmp_path, STEPS, [*callbacks, Look()], **options, **evaluate).train()
    assert written["evaluation"] == [[True] * 3] * STEPS
    assert written["step"] == [[False] * 3] + [[regional] * 3] * (STEPS - 1)


@pytest.mark.parametrize("way", WAYS)
def test_an_evaluation_has_no_step_compiled_anew(way, base_folder, tmp_path):
    """Not by a flag that it sets on a layer either, which compiled code may have looked for."""
    torch._dynamo.reset()
    model, callbacks = start(way, base_folder)
    graphs = []

    class Count(TrainerCallback):
        def on_step_begin(self, *_, **__):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    evaluate = {"eval_strategy": "steps", "eval_steps": 1}
    tiny_trainer(model, tmp_path, STEPS, [*callbacks, Count()], **options, **evaluate).train()
    assert graphs[0] < graphs[1] == graphs[2]


@pytest.mark.parametrize("way", WAYS)
def test_neftune(way, base_folder, tmp_path):
    model, callbacks = start(way, base_folder)
    trainer = tiny_trainer(model, tmp_path, STEPS, callbacks, neftune_noise_alpha=5.0)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert_ordinary(way, tmp_path / "out", base_folder)


@pytest.mark.parametrize("optim", ["adafactor", "adamw_8bit"])
@pytest.mark.parametrize("way", ["patch, protected", "peft, protected"])
def test_optimizers_of_less_memory(way, optim, base_folder, tmp_path):
    """bitsandbytes' moments are of eight bits from 4,096 numbers on: all rows have 8,192."""
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    rows = [list(range(64))] * 3

    name = "model.safetensors" if way.startswith("patch") else "adapter_model.safetensors"

    def run(folder, resume=None, optim=optim):
        model, callbacks = start(way, base_folder, rows=rows)
        trainer = tiny_trainer(model, folder, 6, callbacks, optim=optim)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, load_file(folder / "checkpoint-6" / name)

    (trainer, straight), (_, resumed) = straight_and_resumed(run, tmp_path)
    # A moment of eight bits may be rounded to the next one; a step is of .02.
    atol = 5e-4 if optim == "adamw_8bit" else 1e-6
    torch.testing.assert_close(resumed, straight, rtol=1e-5, atol=atol)
    of = trainer.optimizer.optimizer.state
    states = [of[p] for n, p in trainer.model.named_parameters() if "update" in n]
    if optim == "adafactor":
        assert all("exp_avg_sq_row" in state and "exp_avg_sq" not in state for state in states)
    else:
        assert {state["state1"].dtype for state in states} == {torch.uint8}
        plain, _ = run(tmp_path / "float32", optim="adamw_torch")
        for name, update in updates(trainer.model).items():
            want = updates(plain.model)[name]
            assert functional.cosine_similarity(update.flatten(), want.flatten(), 0) > 0.999
    assert_ordinary(way, tmp_path / "checkpoint-6", base_folder, rows)


TEXTS = [{"input_ids": list(range(3, 20))}]


@pytest.mark.parametrize("way", WAYS)
def test_after_mixed_precision_a_model_is_measured_in_its_own(way, base_folder, tmp_path):
    """accelerate leaves its autocast around the forward pass."""
    model, callbacks = start(way, base_folder)
    tiny_trainer(model, tmp_path, STEPS, callbacks, bf16=True).train()
    wrapped, own = model.forward, model._original_forward
    measured = []
    for forward in (wrapped, own):
        model.forward = forward
        measured.append(loki.drift(model, texts=TEXTS).overall.kl)
        if way.startswith("patch"):
            measured[-1] += loki.attribute(model, TEXTS).scores.abs().sum().item()
        assert model.forward == forward
    assert measured[0] == measured[1] > 0


def test_model_init(base_folder, tmp_path):
    """A search of hyperparameters makes a model for every training."""
    handles = []

    def model_init():
        model = load_model(base_folder)
        handles.append(loki.patch(model, ROWS))
        return model

    trainer = tiny_trainer(model_init(), tmp_path, STEPS)
    trainer.model_init = model_init
    trainer.train()
    assert len(handles) == 2
    assert all(update.any() for update in updates(trainer.model).values())
    trainer.add_callback(handles[-1].trainer_callback())
    with pytest.raises(RuntimeError, match="serves another model than the one that trains"):
        trainer.train()


def test_auto_find_batch_size(plain, base_folder, tmp_path, monkeypatch):
    """The batch is halved after a step that ran out of memory in the middle of the decoder."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # a second in a process of so many imports
    way, _ = plain
    model, callbacks = start(way, base_folder)
    sizes = []

    def run_out_of_memory(_, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    layers = (model if way.startswith("patch") else model.get_base_model()).model.layers
    layers[1].register_forward_pre_hook(run_out_of_memory)
    trainer = tiny_trainer(model, tmp_path, STEPS, callbacks, auto_find_batch_size=True)
    trainer.train()
    assert sizes == [2] + [1] * STEPS
    trainer.save_model(str(tmp_path / "out"))
    assert_ordinary(way, tmp_path / "out", base_folder)


@pytest.mark.parametrize("way", WAYS)
def test_load_best_model_at_end(way, base_folder, tmp_path):
    model, callbacks = start(way, base_folder)
    trainer = tiny_trainer(
        model, tmp_path, 2 * STEPS, callbacks, load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=STEPS,
    )  # fmt: skip
    losses, evaluate = iter([1.0, 2.0]), trainer.evaluate
    trainer.evaluate = lambda *a, **k: (evaluate(*a, **k), {"eval_loss": next(losses)})[1]
    trainer.train()
    best = tmp_path / f"checkpoint-{STEPS}"
    assert trainer.state.best_model_checkpoint == str(best)
    trainer.save_model(str(tmp_path / "out"))
    name = "model.safetensors" if way.startswith("patch") else "adapter_model.safetensors"
    want, got = load_file(best / name), load_file(tmp_path / "out" / name)
    close = 1e-5 if "protected" in way else 0  # what is saved leaves the directions out once more
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=close, atol=close)


def test_liger_kernel(plain, base_folder, tmp_path, monkeypatch):
    """Where there is no GPU, Liger's own kernels are replaced by what they compute."""
    pytest.importorskip("liger_kernel")
    way, want = plain
    from liger_kernel.transformers import swiglu
    from liger_kernel.transformers.model import llama
    from transformers.models.llama import modeling_llama

    for name in ("LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"):  # which Liger replaces
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    parts, ran = {}, set()
    if DEVICE.type == "cpu":
        parts = {"rope": False, "rms_norm": False}
        monkeypatch.setattr(
            swiglu,
            "_swiglu_dispatch",
            lambda a, b, *_: ran.add("mlp") or functional.silu(a) * b,
        )
        monkeypatch.setattr(
            llama, "LigerForCausalLMLoss", lambda *a, **k: ran.add("loss") or _plain_loss(*a, **k)
        )
    options = {"use_liger_kernel": True, "liger_kernel_config": parts}
    for fuse_mlp in (False, True) if way.startswith("patch") else (False,):
        model, callbacks = start(way, base_folder, fuse_mlp=fuse_mlp)
        trainer = tiny_trainer(model, tmp_path, STEPS, callbacks, **options)
        trainer.train()
        assert DEVICE.type != "cpu" or ran == {"mlp", "loss"}
        ran.clear()
        for name, update in updates(model).items():
            torch.testing.assert_close(update, want[name], rtol=1e-3, atol=1e-4, msg=name)
        trainer.save_model(str(tmp_path / "out"))
        assert_ordinary(way, tmp_path / "out", base_folder)


def test_liger_kernel_does_not_replace_experts(tmp_path, monkeypatch):
    """Its forward pass of experts reads the base's weight alone."""
    pytest.importorskip("liger_kernel")
    from transformers.models.mixtral import modeling_mixtral

    experts = modeling_mixtral.MixtralExperts  # which Liger replaces for models to come too
    monkeypatch.setattr(modeling_mixtral, "MixtralExperts", experts)
    kernels = {"rope": False, "rms_norm": False, "fused_linear_cross_entropy": False}
    base = build("MixtralForCausalLM")

    def train(**options):
        model = copy.deepcopy(base)
        loki.patch(model, [[1], [0], [7, 3], [2]])
        options = {"use_liger_kernel": True, "liger_kernel_config": kernels, **options}
        tiny_trainer(model, tmp_path, STEPS, **options).train()
        return updates(model)

    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        with pytest.raises(RuntimeError, match=r"experts by LigerExperts\.forward"):
            train(**options)
    assert all(u.any() for u in train(liger_kernel_config={**kernels, "swiglu": False}).values())


def _plain_loss(hidden_states, lm_head_weight, labels, hidden_size, shift_labels=None, **_):
    logits = hidden_states @ lm_head_weight.T
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
