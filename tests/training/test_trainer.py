"""The engines people train with, each around a patched model. HF Trainer is in test_patching."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import loki_kernels as loki
from tests.models import DEVICE, build_model
from tests.tiny_training import ROWS, logits, optimizer_of, token_batch, train


@pytest.fixture
def want():
    """State dict after three steps of a bare loop."""
    model = build_model("llama_mlp_bias")
    loki.patch(model, ROWS)
    return train(model).state_dict()


def assert_trained(model, want, tolerance=1e-5):
    state = model.state_dict()
    for name, tensor in want.items():
        got = state[name].cpu()  # Lightning leaves a model there
        torch.testing.assert_close(got, tensor.cpu(), rtol=tolerance, atol=tolerance, msg=name)


def test_compiled_model_trains_the_same_in_one_graph(want):
    torch._dynamo.reset()
    model = build_model("llama_mlp_bias")
    loki.patch(model, ROWS)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = optimizer_of(model)
    for _ in range(3):
        run(input_ids=token_batch(4), labels=token_batch(4), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1
    assert_trained(model, want, 1e-4)


def test_compiled_layers_of_an_eager_model(want):
    """Regional compilation: the decoder writes the rows, the compiled layers add a zero."""
    torch._dynamo.reset()
    model = build_model("llama_mlp_bias")
    loki.patch(model, ROWS)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    assert_trained(train(model), want, 1e-4)


def new_accelerator():
    """In float32: an earlier trainer's precision stays with its process."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state()
    return accelerate.Accelerator(cpu=DEVICE.type == "cpu", mixed_precision="no")


def test_accelerate(want):
    accelerator = new_accelerator()
    model = build_model("llama_mlp_bias")
    loki.patch(model, ROWS)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    for _ in range(3):
        accelerator.backward(prepared(input_ids=token_batch(4), labels=token_batch(4)).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert_trained(accelerator.unwrap_model(prepared), want)


@pytest.mark.parametrize("rank", [None, 2])
def test_accelerate_resumes_bit_exactly(tmp_path, rank):
    """``save_state`` and ``load_state`` alone, over a bfloat16 model."""

    def start():
        torch.manual_seed(0)
        accelerator = new_accelerator()
        model = build_model(dtype=torch.bfloat16)
        loki.patch(model, ROWS, rank=rank)
        return accelerator, *accelerator.prepare(model, optimizer_of(model))

    def step(accelerator, model, optimizer):
        accelerator.backward(model(input_ids=token_batch(4), labels=token_batch(4)).loss)
        optimizer.step()
        optimizer.zero_grad()

    accelerator, model, optimizer = start()
    step(accelerator, model, optimizer)
    accelerator.save_state(str(tmp_path))
    step(accelerator, model, optimizer)
    again, resumed, other = start()
    again.load_state(str(tmp_path))
    step(again, resumed, other)
    want = accelerator.unwrap_model(model).state_dict()
    for name, tensor in again.unwrap_model(resumed).state_dict().items():
        assert torch.equal(tensor, want[name]), name


def test_device_map(want):
    """A model that accelerate has dispatched has hooks on every module."""
    from accelerate import dispatch_model

    model = build_model("llama_mlp_bias")
    device = str(model.device)
    dispatch_model(model, {"": device}, main_device=device, force_hooks=True)
    handle = loki.patch(model, ROWS)
    assert_trained(train(model), want)
    handle.unpatch()
    assert torch.equal(logits(model), logits(build_model("llama_mlp_bias")))


def test_lightning(want, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build_model("llama_mlp_bias")
            loki.patch(self.model, ROWS)

        def training_step(self, ids, _):
            return self.model(input_ids=ids, labels=ids).loss

        def configure_optimizers(self):
            return optimizer_of(self)

    def trainer(steps):
        return lightning.Trainer(
            max_steps=steps, max_epochs=-1, logger=False, barebones=False,
            accelerator="gpu" if DEVICE.type == "cuda" else "cpu", devices=1,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            enable_checkpointing=False,
        )  # fmt: skip

    loader = torch.utils.data.DataLoader(list(token_batch(4).cpu()), batch_size=4)
    module = Module()
    module.model.eval()
    trainer(3).fit(module, loader)
    assert_trained(module.model, want)

    resumed, run = Module(), trainer(2)
    resumed.model.eval()
    run.fit(resumed, loader)
    run.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Module()
    resumed.model.eval()
    trainer(3).fit(resumed, loader, ckpt_path=tmp_path / "last.ckpt")
    for name, tensor in module.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
