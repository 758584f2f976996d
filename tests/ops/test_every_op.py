"""What holds for every op; and the check that lets ``auto`` use a kernel passes for ours alone."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loki_kernels import ops
from loki_kernels.ops import _dispatch


def compare(op, backend, dtype=torch.float32):
    return _dispatch._compare(op, backend, torch.get_default_device(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_self_check_passes(op, dtype, backend):
    assert compare(op, backend, dtype) is None


def test_self_check_fails_for_a_wrong_kernel(op, backend, monkeypatch):
    module = importlib.import_module(f"loki_kernels.ops.{op}.{backend}_impl")
    right = module.forward

    def wrong(*args):
        results = right(*args)
        for x in args if results is None else [results]:  # an op that returns nothing writes
            for tensor in x if isinstance(x, (tuple, list)) else [x]:
                if isinstance(tensor, torch.Tensor) and tensor.numel():
                    tensor[(0,) * tensor.ndim] += 1 if tensor.dtype == torch.int64 else 0.1
        return results

    monkeypatch.setattr(module, "forward", wrong)
    assert "relative error" in _dispatch._compare(
        op, backend, torch.get_default_device(), torch.float32
    )


def test_self_check_reports_a_kernel_that_does_not_run(op, backend, monkeypatch):
    module = importlib.import_module(f"loki_kernels.ops.{op}.{backend}_impl")

    def broken(*args):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(module, "forward", broken)
    message = "RuntimeError: out of resource: shared memory"
    assert compare(op, backend) == message


def test_computes_the_same_under_autocast(op, backend):
    device = torch.get_default_device()
    inputs, differentiable = _dispatch.example(op, device, torch.float32)
    evaluate = functools.partial(_dispatch._evaluate, getattr(ops, op), inputs, differentiable)
    want = evaluate()
    with torch.autocast(device.type, torch.bfloat16):
        got = evaluate()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_a_compiler_is_told_of_the_results_is_so(op, dtype):
    """Their shapes and dtypes, by the fake implementations."""
    if op == "count_lowest":
        pytest.skip("it looks for NaN first, and its counts are int64 whatever the scores")
    device = torch.get_default_device()
    inputs, _ = _dispatch.example(op, device, dtype)
    want = getattr(ops, op)(**inputs)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:

        def fake(value):
            if isinstance(value, (list, tuple)):
                return type(value)(map(fake, value))
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        inputs, _ = _dispatch.example(op, device, dtype)
        got = getattr(ops, op)(**{name: fake(value) for name, value in inputs.items()})
    for a, b in zip(_tensors(got), _tensors(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)


def _tensors(results):
    results = results if isinstance(results, (list, tuple)) else [results]
    return [x for x in results if isinstance(x, torch.Tensor)]


def test_an_unknown_backend_is_named_before_anything_is_computed(op):
    inputs, _ = _dispatch.example(op, torch.get_default_device(), torch.float32)
    with pytest.raises(ValueError, match="'cublas'"):
        getattr(ops, op)(**inputs, backend="cublas")
