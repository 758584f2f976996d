"""Platforms that are not here, by pretending: Windows, ROCm, Apple's MPS."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

import loki_kernels as loki
from loki_kernels import environment, files
from loki_kernels.attribution import job, log
from loki_kernels.ops import _dispatch
from tests.attribution.results import assert_same
from tests.attribution.test_log import OPTIONS, PROMPTS, leave_two_batches
from tests.models import build_model
from tests.tiny_training import ROWS, token_batch, train

# Modules that need Triton, compiled code or Axolotl, and programs.
NOT_THERE = ("triton_impl", "_triton", "_cpp", "_cuda", "_build_info", "axolotl", "__main__")
MPS = torch.device("mps")


def test_without_triton_fcntl_and_distributed(tmp_path):
    """What Windows lacks: every module is imported, and a model is patched, trained and saved."""
    script = f"""
        import importlib, pkgutil, sys
        import torch
        from tests.models import build_model
        from tests.tiny_training import ROWS, train
        import peft, transformers.trainer

        model = build_model(device="cpu")
        train(model, steps=1)  # what others import as they run
        torch.distributed.is_available = lambda: False
        for name in ("triton", "fcntl", "torch.distributed.tensor", "torch.distributed.fsdp"):
            sys.modules[name] = None
        import loki_kernels as loki

        for module in pkgutil.walk_packages(loki.__path__, "loki_kernels."):
            if module.name.rpartition(".")[2] not in {NOT_THERE!r}:
                importlib.import_module(module.name)
        scores = loki.attribute(model, [{{"input_ids": torch.arange(5)}}])
        handle = loki.patch(model, loki.select(scores, quota=10.0))
        train(model, steps=1)
        loki.save_adapter(model, {str(tmp_path)!r})
        handle.merge()
        print("fine")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip().endswith("fine"), run.stderr
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.fixture
def windows(monkeypatch):
    """Files as they are there: no open or mapped one is renamed, replaced or removed."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    import fcntl

    def locking(handle, mode, count):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error

    def refusing(function):
        def guarded(*paths, **options):
            lines = Path("/proc/self/maps").read_text().splitlines()
            used = {line.split(maxsplit=5)[-1] for line in lines}
            used.update(os.path.realpath(handle) for handle in os.scandir("/proc/self/fd"))
            for path in map(os.path.abspath, paths):
                if path in used:
                    raise PermissionError(errno.EACCES, "Access is denied", path)
            return function(*paths, **options)

        return guarded

    fake = SimpleNamespace(LK_NBLCK=2, locking=locking)
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.delattr(os, "posix_fallocate")
    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


@pytest.mark.parametrize("keep", ["scores", "counts"])
def test_a_log_on_windows(windows, keep, monkeypatch, tmp_path):
    """It is continued, locked, and removed, though no open file can be."""
    monkeypatch.setattr(log, "_SECONDS_BETWEEN_COUNTS", 0)
    out, model = tmp_path / "result.safetensors", build_model(device="cpu")
    options = OPTIONS | {"keep": keep}
    want = loki.attribute(model, PROMPTS, **options)
    leave_two_batches(model, out, monkeypatch, keep=keep)
    compute = job.attribute_batch

    def nested(*args):
        with pytest.raises(RuntimeError, match="another process is writing"):
            loki.attribute(model, PROMPTS, out=out, **options)
        return compute(*args)

    with monkeypatch.context() as patched:
        patched.setattr(job, "attribute_batch", nested)
        got = loki.attribute(model, PROMPTS, out=out, **options)
    assert_same(got, want)
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(PermissionError, match="On Windows close what has it open"):
        loki.attribute(model, PROMPTS[:4], out=out, **options)
    del got
    monkeypatch.setattr(job, "attribute_batch", None)  # nothing is computed again
    again = loki.attribute(model, PROMPTS[:4], out=out, **options)
    assert_same(again, type(want).load(out))
    assert list(tmp_path.iterdir()) == [out]


def test_rocm(monkeypatch):
    """Triton is tried whatever the capability says; CUDA's kernels are not compiled there."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "AMD Instinct MI300X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    monkeypatch.setattr(_dispatch._native, "why_not", lambda library: "not compiled: no nvcc.")
    _dispatch._backend_why_not.cache_clear()
    try:
        states = loki.backends()
        report = environment.environment()
    finally:
        _dispatch._backend_why_not.cache_clear()
    assert report["device"] == "AMD Instinct MI300X (ROCm 7.1)"
    for op, state in states.items():
        assert state["torch"] == "live"
        assert state["cuda"].startswith("not live"), op
        if _dispatch._exists(op, "triton"):
            assert not state["triton"].startswith("not live"), op


class Apple(TorchFunctionMode):
    """Tensors of the CPU that say they are on MPS, and have no float64, as there."""

    def place(self, module):
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.on_apple = True
        return module

    def __torch_function__(self, function, types, args=(), kwargs=None):
        inside = torch.utils._pytree.tree_leaves((args, kwargs))
        here = any(isinstance(x, torch.Tensor) and getattr(x, "on_apple", False) for x in inside)
        if function == torch.Tensor.device.__get__ and here:
            return MPS
        moved = any(isinstance(x, (torch.device, str)) and str(x) == "mps" for x in inside)
        args, kwargs = (torch.utils._pytree.tree_map(_on_the_cpu, x) for x in (args, kwargs or {}))
        with torch._C.DisableTorchFunction():
            result = function(*args, **kwargs)
            to_cpu = function is torch.Tensor.to and any(str(x) == "cpu" for x in inside)
            if function is torch.Tensor.cpu or (to_cpu and not moved):
                return result.view_as(result)  # an object that is not marked
        if here or moved:
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    if x.dtype == torch.float64:
                        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
                    x.on_apple = True
        return result


@pytest.fixture
def elsewhere():
    """A default device on which nothing can be read, of a user's script or notebook."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_another_default_device(elsewhere, tmp_path):
    ids = [[5, 6, 7, 8, 9], [3, 4, 5]]
    prompts = [{"input_ids": one, "position_ids": list(range(len(one)))} for one in ids]
    with torch.device("cpu"):
        model = build_model(device="cpu")
        want = loki.attribute(model, prompts, rule="gauss-legendre")
    got = loki.attribute(model, prompts, rule="gauss-legendre")
    assert torch.equal(got.scores, want.scores)
    assert loki.mean_activations(model, prompts).shape == (3, 48)
    protection = loki.estimate_protection(model, [list(range(60))] * 8)
    handle = loki.patch(model, loki.select(got, 10), protect=protection, fuse_mlp=True)
    loki.save_adapter(model, tmp_path)
    assert float(loki.drift(handle, texts=[{"input_ids": list(range(20))}]).overall.kl) == 0
    assert loki.limit_drift(handle, 0.1, [{"input_ids": list(range(20))}])[0] == 1
    handle.unpatch()
    loki.load_adapter(model, tmp_path)


def _on_the_cpu(x):
    return torch.device("cpu") if isinstance(x, (torch.device, str)) and str(x) == "mps" else x


def test_mps(tmp_path):
    """Analysis and training where there is no float64, and no kernel but torch's own."""
    prompts = [{"input_ids": ids} for ids in token_batch(3).cpu()]
    want = loki.attribute(build_model(device="cpu"), prompts)
    trained = build_model("llama", device="cpu")
    loki.patch(trained, ROWS, fuse_mlp=True)
    train(trained)
    with Apple() as apple:
        model = apple.place(build_model(device="cpu"))
        assert next(model.parameters()).device == MPS
        with pytest.raises(TypeError, match="float64"):
            next(model.parameters()).double()
        got = loki.attribute(model, prompts, out=tmp_path / "scores.safetensors")
        handle = loki.patch(model, ROWS, fuse_mlp=True)
        assert handle.report.fused
        train(apple.place(model))
    torch.testing.assert_close(got.scores, want.scores)
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


def test_nothing_but_torch_runs_on_mps():
    tensor = SimpleNamespace(device=MPS, dtype=torch.float32)
    for op in _dispatch._ops:
        assert _dispatch.choose(op, None, [tensor]).__name__.endswith("torch_impl")
