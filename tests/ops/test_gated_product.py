from __future__ import annotations

import pytest
import torch
from torch import library as torch_library

from loki_kernels.ops import gated_product
from loki_kernels.ops.gated_product.reference import gated_product_reference
from tests.ops.tolerance import assert_as_close, example

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu_tanh"]
SHAPES = [(1,), (63,), (2, 129), (3, 1, 500), (0, 5)]


def make(shape, dtype=torch.float32, spread=3.0):
    torch.manual_seed(sum(shape))
    return [(spread * torch.randn(shape)).to(dtype) for _ in range(3)]


def run(op, gate, up, upstream, activation):
    gate, up = (x.detach().requires_grad_() for x in (gate, up))
    y = op(gate, up, activation)
    return [y.detach(), *torch.autograd.grad(y, (gate, up), upstream)]


def assert_two_references(gate, up, upstream, activation):
    best = run(gated_product_reference, gate.double(), up.double(), upstream.double(), activation)
    same = run(gated_product_reference, gate, up, upstream, activation)
    got = run(gated_product, gate, up, upstream, activation)
    assert_as_close(got, same, best, 1e-12 if gate.dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, activation, dtype):
    if dtype.itemsize == 2:  # the rounding errors of one or two numbers are too few to compare
        shape = (64, *shape)
    assert_two_references(*make(shape, dtype), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saturated_gates_stay_finite(activation):
    gate, up, upstream = make((501,))
    gate = torch.linspace(-200, 200, 501)
    for y in run(gated_product, gate, up, upstream, activation):
        assert torch.isfinite(y).all()
    assert_two_references(gate, up, upstream, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_contiguous(activation):
    gate, up, upstream = (x.t() for x in make((63, 20)))
    assert not gate.is_contiguous()
    assert_two_references(gate, up, upstream, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [63, 1500])
def test_halves_of_one_tensor(width, activation):
    gate, up = make((3, 7, 2 * width))[0].chunk(2, dim=-1)
    assert_two_references(gate, up, make((3, 7, width))[0], activation)
    # ... beside one whose tokens are not evenly apart, and one for all tokens
    gate = make((3, 9, width))[0][:, :7]
    up = make((width,))[0].expand(3, 7, width)
    assert_two_references(gate, up, make((3, 7, width))[0], activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    gate, up, _ = make((3, 5), torch.float64)
    assert torch.autograd.gradcheck(
        lambda g, u: gated_product(g, u, activation), (gate.requires_grad_(), up.requires_grad_())
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_recomputes_the_product(activation):
    gate, up, upstream = make((7, 63))
    product = torch.ops.loki_kernels.gated_product_backward(upstream, gate, up, activation, None)[2]
    torch.testing.assert_close(product, gated_product(gate, up, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_is_written_over(activation):
    inputs = make((9, 63))
    kept = [x.clone() for x in inputs]
    run(gated_product, *inputs, activation)
    assert all(torch.equal(x, k) for x, k in zip(inputs, kept, strict=True))


def test_registration():
    inputs = example("gated_product")
    gate, up = (x.requires_grad_() for x in inputs.values())
    torch_library.opcheck(torch.ops.loki_kernels.gated_product.default, (gate, up, "silu", None))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiles_whole(activation):
    torch._dynamo.reset()
    inputs = make((9, 63))
    compiled = torch.compile(gated_product, fullgraph=True, backend="aot_eager")
    got = run(compiled, *inputs, activation)
    for g, w in zip(got, run(gated_product, *inputs, activation), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"up": torch.zeros(3, 4)}, "up must be"),
        ({"up": torch.zeros(3, 5, dtype=torch.float64)}, "share a dtype"),
        ({"activation": "relu"}, "activation='relu'"),
    ],
)
def test_bad_input_raises(options, message):
    with pytest.raises(ValueError, match=message):
        gated_product(**({"gate": torch.zeros(3, 5), "up": torch.zeros(3, 5)} | options))
