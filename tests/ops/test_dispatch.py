"""Which implementation runs, and how a user sees and overrides it."""

from __future__ import annotations

import json
import logging
import os
from types import SimpleNamespace

import pytest
import torch

import loki_kernels as loki
from loki_kernels.ops import _dispatch, count_lowest
from loki_kernels.ops._table import Backends

OP = "integrate_path"  # has kernels in Triton alone
interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def inputs(device="cpu"):
    return [torch.zeros(3, 2, 5, device=device), torch.zeros(2, device=device), None, None]


def count(**options):
    """A call of an op that has every backend."""
    return count_lowest(torch.zeros(3, 2, 5), 1, **options)


@pytest.fixture
def accelerator(monkeypatch):
    """A device on which triton's kernels could run: ``meta`` stands in for it."""
    kernel = SimpleNamespace(unsupported=lambda *_: None)
    torch_kernel = SimpleNamespace()
    monkeypatch.delenv("LOKI_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(_dispatch, "_checks", {})
    monkeypatch.setattr(_dispatch, "_postponed", {})
    monkeypatch.setattr(_dispatch, "_compare", lambda *_: None)
    monkeypatch.setattr(
        _dispatch,
        "_backend_why_not",
        lambda backend, _: "there is no compiler." if backend == "cuda" else None,
    )
    monkeypatch.setattr(
        _dispatch, "_module", lambda _, backend: torch_kernel if backend == "torch" else kernel
    )
    return SimpleNamespace(triton=kernel, torch=torch_kernel, monkeypatch=monkeypatch)


def test_report_names_every_op_and_backend():
    report = loki.backends()
    assert set(report) == {
        "count_lowest",
        "gated_product",
        "integrate_path",
        "shared_prefix_attention",
        "sync_rows",
        "target_probability",
    }
    for states in report.values():
        assert list(states) == ["cuda", "triton", "cpp", "torch"]
        assert states["torch"] == "live"


def test_the_report_prints_as_a_table():
    reason = "it needs a CUDA device, not cpu."
    off = f"not live: {reason}"
    report = Backends(
        one={"cuda": off, "cpp": "verified in float32", "torch": "live"},
        another={"cuda": off, "cpp": "not live: it has no cpp implementation.", "torch": "live"},
    )
    assert str(report).splitlines() == [
        "         cuda          cpp                  torch",
        "one      not live [1]  verified in float32  live",
        "another  not live [1]  -                    live",
        f"[1] {reason}",
    ]
    assert repr(report) == str(report)
    assert json.loads(json.dumps(report)) == report  # a dict for everything else
    printed = str(loki.backends())
    assert printed.isascii()
    assert all(printed.count(f"{op} ") == 1 for op in loki.backends())
    assert str(Backends()) == ""


@pytest.mark.skipif(torch.cuda.is_available() or interpreted, reason="triton runs here")
def test_on_a_cpu_torch_runs_and_the_report_says_why():
    pytest.importorskip("triton")
    report = loki.backends()
    for op, states in report.items():
        for name in ("cuda", "triton"):
            assert states[name].startswith("not live: ")
            assert ("no " in states[name]) == (not _dispatch._exists(op, name))
        assert _dispatch._exists(op, "cpp") or states["cpp"] == (
            "not live: it has no cpp implementation."
        )
    assert "needs a CUDA device" in report["count_lowest"]["triton"]
    with pytest.raises(RuntimeError, match=r"count_lowest cannot run on backend='triton'.*CUDA"):
        count(backend="triton")


def test_unknown_names_raise(monkeypatch):
    with pytest.raises(ValueError, match="choose one of cuda, triton, cpp, torch"):
        count(backend="cublas")
    monkeypatch.setenv("LOKI_KERNELS_BACKEND", "cublas")
    with pytest.raises(ValueError, match="LOKI_KERNELS_BACKEND='cublas' is unknown"):
        count()


def test_a_backend_asked_for_by_name_runs_or_raises(monkeypatch):
    reasons = {"cuda": "no compiler.", "triton": None, "torch": None}
    monkeypatch.setattr(_dispatch, "_backend_why_not", lambda backend, _: reasons[backend])
    with pytest.raises(RuntimeError, match="cannot run on backend='cuda': no compiler"):
        count(backend="cuda")
    monkeypatch.setenv("LOKI_KERNELS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="LOKI_KERNELS_BACKEND=cuda cannot be used: no comp"):
        count()
    assert count(backend="torch").shape == (2, 5)  # the call goes first


def test_a_backend_for_another_device_leaves_this_one_to_auto(accelerator):
    """On a machine with a GPU, scores on the CPU are ranked there whatever the GPU runs."""
    here = torch.device("cpu")
    accelerator.monkeypatch.setattr(
        _dispatch,
        "_backend_why_not",
        lambda backend, device: "not there." if backend == "triton" and device == here else None,
    )
    accelerator.monkeypatch.setattr(_dispatch, "_device_of", lambda _: torch.device("meta"))
    accelerator.monkeypatch.setenv("LOKI_KERNELS_BACKEND", "triton")
    assert _dispatch.choose(OP, None, inputs("meta")) is accelerator.triton
    assert _dispatch.choose(OP, None, inputs("cpu")) is accelerator.torch


def test_on_a_cpu_auto_uses_compiled_cpp_and_no_interpreter(accelerator):
    op, scores = "count_lowest", [torch.zeros(2, 3, 5)]
    accelerator.monkeypatch.setattr(_dispatch, "_module", lambda _, backend: backend)
    accelerator.monkeypatch.setattr(_dispatch, "_why_not", lambda *_: None)
    assert _dispatch.choose(op, None, scores) == "cpp"
    accelerator.monkeypatch.setattr(
        _dispatch, "_why_not", lambda _, backend, *__: "not compiled." if backend == "cpp" else None
    )
    assert _dispatch.choose(op, None, scores) == "torch"


def test_auto_uses_a_kernel_once_it_has_been_checked(accelerator):
    calls = []
    accelerator.monkeypatch.setattr(_dispatch, "_compare", lambda *key: calls.append(key))
    for _ in range(2):
        assert _dispatch.choose(OP, None, inputs("meta")) is accelerator.triton
    half = [inputs("meta")[0].half()]
    assert _dispatch.choose(OP, None, half) is accelerator.triton
    meta = torch.device("meta")
    assert calls == [(OP, "triton", meta, torch.float32), (OP, "triton", meta, torch.float16)]


def test_auto_falls_back_with_one_warning(accelerator, caplog):
    accelerator.monkeypatch.setattr(_dispatch, "_compare", lambda *_: "result 0: wrong")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert _dispatch.choose(OP, None, inputs("meta")) is accelerator.torch
    (record,) = caplog.records
    assert "triton kernel of integrate_path failed its self-check" in record.getMessage()
    assert "result 0: wrong" in record.getMessage()


def test_report_after_a_check(accelerator):
    meta = torch.device("meta")
    _dispatch.choose(OP, None, inputs("meta"))
    state = _dispatch._state(OP, "triton", meta)
    assert state == "verified in float32"
    assert _dispatch._state("gated_product", "triton", meta) == "checked at first use"
    accelerator.monkeypatch.setattr(_dispatch, "_compare", lambda *_: "result 0: wrong")
    _dispatch.choose(OP, None, [inputs("meta")[0].half()])
    state = _dispatch._state(OP, "triton", meta)
    assert state == "failed its self-check: torch.float16: result 0: wrong"


def test_auto_leaves_unsupported_inputs_to_torch(accelerator):
    accelerator.triton.unsupported = lambda *_: "it takes no zeros."
    assert _dispatch.choose(OP, None, inputs("meta")) is accelerator.torch
    with pytest.raises(RuntimeError, match="it takes no zeros"):
        _dispatch.choose(OP, "triton", inputs("meta"))
    accelerator.monkeypatch.setenv("LOKI_KERNELS_BACKEND", "triton")
    assert _dispatch.choose(OP, None, inputs("meta")) is accelerator.torch


@pytest.mark.parametrize("module", ["triton.language", "loki_kernels.ops._triton"])
def test_a_triton_that_cannot_be_imported_is_no_backend(module, monkeypatch):
    """A broken library, or a folder of that name where Python looks first; one that is too old."""
    pytest.importorskip("triton")

    def fails(name):
        if name == module:
            raise ImportError("libtriton.so")

    monkeypatch.setattr(_dispatch, "_gpu_why_not", lambda _device: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_dispatch.importlib, "import_module", fails)
    reason = _dispatch._backend_why_not.__wrapped__("triton", torch.device("cuda"))
    assert "cannot be imported (ImportError: libtriton.so)" in reason


def test_environment_variable_wins_over_auto(accelerator):
    accelerator.monkeypatch.setenv("LOKI_KERNELS_BACKEND", "torch")
    assert _dispatch.choose(OP, None, inputs("meta")) is accelerator.torch
    accelerator.monkeypatch.setenv("LOKI_KERNELS_BACKEND", "triton")
    accelerator.monkeypatch.setattr(_dispatch, "_compare", lambda *_: "not asked")
    assert _dispatch.choose(OP, None, inputs("meta")) is accelerator.triton


class Check:
    """In the place of a kernel's self-check: raises what `errors` has left, then agrees."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), []

    def __call__(self, *key):
        self.calls.append(key)
        if self.errors:
            raise self.errors.pop(0)


@pytest.fixture
def clock(accelerator):
    """Time that stands still unless a test moves it."""
    now = SimpleNamespace(seconds=1000.0)
    accelerator.monkeypatch.setattr(_dispatch.time, "monotonic", lambda: now.seconds)
    return now


def test_full_memory_is_no_verdict(accelerator, clock, caplog):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    check = Check(full, full)
    accelerator.monkeypatch.setattr(_dispatch, "_compare", check)
    for seconds, calls, kernel in [
        (0, 1, accelerator.torch),
        (0.5, 1, accelerator.torch),  # not at every call
        (1.5, 2, accelerator.torch),
        (3, 2, accelerator.torch),  # and each time after a longer while
        (4, 3, accelerator.triton),
        (4, 3, accelerator.triton),
    ]:
        clock.seconds = 1000 + seconds
        assert _dispatch.choose(OP, None, inputs("meta")) is kernel
        assert len(check.calls) == calls
        failed = "failed" in _dispatch._state(OP, "triton", torch.device("meta"))
        assert not failed
    assert len(caplog.records) == 2
    assert "memory was full when the triton kernel" in caplog.records[0].getMessage()
    assert "Please report" not in caplog.text


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (
            RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            True,
        ),
        (RuntimeError("cudaErrorMemoryAllocation"), True),
        (RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_which_errors_are_full_memory(error, transient, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(_dispatch, "_evaluate", fails)
    arguments = ("count_lowest", "torch", torch.device("cpu"), torch.float32)
    if transient:
        with pytest.raises(type(error)):
            _dispatch._compare(*arguments)
    else:
        assert str(error) in _dispatch._compare(*arguments)


def test_no_self_check_starts_inside_a_graphs_capture(accelerator, clock):
    check, device = Check(), torch.device("cuda", 0)
    accelerator.monkeypatch.setattr(_dispatch, "_compare", check)
    accelerator.monkeypatch.setattr(_dispatch, "_first_tensor", lambda _: x)
    capturing = [True]
    accelerator.monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    x = SimpleNamespace(device=device, dtype=torch.float32)
    assert _dispatch.choose(OP, None, [x]) is accelerator.torch
    assert check.calls == []
    assert _dispatch._state(OP, "triton", device) == "checked at first use"
    capturing[0] = False
    assert _dispatch.choose(OP, None, [x]) is accelerator.triton
    capturing[0] = True  # with a verdict
    assert _dispatch.choose(OP, None, [x]) is accelerator.triton
    assert len(check.calls) == 1


def test_warm_up_checks_what_the_first_call_would(accelerator, clock):
    check, meta = Check(), torch.device("meta")
    accelerator.monkeypatch.setattr(_dispatch, "_compare", check)
    accelerator.monkeypatch.setenv("LOKI_KERNELS_BACKEND", "torch")
    _dispatch.warm_up([OP], meta, torch.float32)
    assert check.calls == []  # a backend named is not checked
    accelerator.monkeypatch.delenv("LOKI_KERNELS_BACKEND")
    for _ in range(2):
        _dispatch.warm_up([OP, "gated_product"], meta, torch.bfloat16)
    wanted = [(op, "triton", meta, torch.bfloat16) for op in (OP, "gated_product")]
    assert check.calls == wanted
    half = [inputs("meta")[0].bfloat16()]
    assert _dispatch.choose(OP, None, half) is accelerator.triton
    assert check.calls == wanted
    _dispatch.warm_up([OP], meta, torch.float64)  # which no kernel takes, and none has failed
    assert check.calls == wanted


def test_warm_up_does_nothing_where_auto_has_torch_alone(monkeypatch):
    calls = []
    monkeypatch.delenv("LOKI_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(_dispatch, "_checks", {})
    monkeypatch.setattr(_dispatch, "_postponed", {})
    monkeypatch.setattr(_dispatch, "_compare", lambda *checked: calls.append(checked))
    monkeypatch.setattr(_dispatch, "_backend_why_not", lambda *_: "it is not here.")
    _dispatch.warm_up([OP, "count_lowest"], torch.device("meta"), torch.float32)
    _dispatch.warm_up([OP], torch.device("cpu"), torch.float32)
    assert calls == []


def test_the_first_of_several_backends_is_cuda(accelerator):
    accelerator.monkeypatch.setattr(_dispatch, "_backend_why_not", lambda *_: None)
    accelerator.monkeypatch.setattr(_dispatch, "_module", lambda _, backend: backend_of(backend))
    assert _dispatch.choose("count_lowest", None, inputs("meta")).name == "cuda"


def backend_of(name):
    return SimpleNamespace(name=name, unsupported=lambda *_: None)


def test_self_check_has_none_of_the_callers_state(accelerator):
    seen = []

    def compare(*_):
        x = torch.ones(1, requires_grad=True)
        seen.append((x * 2).requires_grad and not torch.is_autocast_enabled("cpu"))

    accelerator.monkeypatch.setattr(_dispatch, "_compare", compare)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        _dispatch.choose(OP, None, inputs("meta"))
    assert seen == [True]


def test_self_check_needs_no_other_thread():
    """Its gradients are computed where it runs: the device's thread may be waiting for it."""
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch._C._is_multithreading_enabled())
            return 2 * grad

    _dispatch._evaluate(lambda x: Double.apply(x), {"x": torch.ones(3)}, ("x",))
    assert seen == [False]
