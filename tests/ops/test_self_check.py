"""The check that lets ``auto`` use a kernel: it passes for ours and fails for a wrong one."""

from __future__ import annotations

import importlib

import pytest
import torch

from loki_kernels.ops import _dispatch


def compare(op, backend, dtype=torch.float32):
    return _dispatch._compare(op, backend, torch.get_default_device(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_passes(op, dtype, backend):
    assert compare(op, backend, dtype) is None


def test_fails_for_a_wrong_kernel(op, backend, monkeypatch):
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


def test_reports_a_kernel_that_does_not_run(op, backend, monkeypatch):
    module = importlib.import_module(f"loki_kernels.ops.{op}.{backend}_impl")

    def broken(*args):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(module, "forward", broken)
    message = "RuntimeError: out of resource: shared memory"
    assert compare(op, backend) == message
