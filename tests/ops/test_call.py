"""Ops called past torch's dispatcher give what the registered ops give, and give way to tracing."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from loki_kernels import ops
from loki_kernels.ops import _call, _dispatch

DIFFERENTIABLE = sorted(_call._functions)


def evaluate(op):
    inputs, differentiable = _dispatch.example(op, torch.device("cpu"), torch.float32)
    return _dispatch._evaluate(getattr(ops, op), inputs, differentiable)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [*DIFFERENTIABLE, "integrate_path"])
def test_gives_what_the_registered_op_gives(op):
    got = evaluate(op)
    with Seen() as seen:
        want = evaluate(op)
    assert f"loki_kernels::{op}" in seen.names
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_runs_past_the_dispatcher(op, monkeypatch):
    monkeypatch.setattr(_call.torch, "ops", None)
    assert all(x.isfinite().all() for x in evaluate(op))


def test_a_trace_holds_the_op():
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    graph = make_fx(lambda x: ops.gated_product(x, x))(x).graph
    assert torch.ops.loki_kernels.gated_product.default in {node.target for node in graph.nodes}


def test_tensors_without_values_get_the_op():
    with torch.device("meta"):
        product = ops.gated_product(torch.empty(2, 3), torch.empty(2, 3))
    assert product.is_meta
    assert product.shape == (2, 3)


def test_an_integer_is_taken_for_a_float():
    hidden, weight = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([2, 0, 1])
    got = ops.target_probability(hidden, weight, target, softcap=3, logit_scale=2)
    want = ops.target_probability(hidden, weight, target, softcap=3.0, logit_scale=2.0)
    assert torch.equal(got.probability, want.probability)


def test_a_scripted_trace_holds_the_op():
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    graph = torch.jit.trace(lambda x: ops.gated_product(x, x), x).graph
    assert "loki_kernels::gated_product" in {node.kind() for node in graph.nodes()}


def test_batched_gradients_go_through_the_op(monkeypatch):
    """Those of is_grads_batched have no storage that a kernel could read."""
    run = _call._steps["gated_product_backward"]

    def reading(*args):
        for x in args:
            if isinstance(x, torch.Tensor):
                x.data_ptr()
        return run(*args)

    monkeypatch.setitem(_call._steps, "gated_product_backward", reading)
    x = torch.randn(3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = ops.gated_product(x, x)
    (got,) = torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    for row, unit in zip(got, torch.eye(3), strict=True):
        torch.testing.assert_close(row, torch.autograd.grad(y, x, unit, retain_graph=True)[0])
