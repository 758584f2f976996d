from __future__ import annotations

from functools import partial

import pytest
import torch

from loki_kernels.ops import row_masked_linear, swiglu_row_masked_linear
from loki_kernels.ops.swiglu_row_masked_linear.reference import swiglu_row_masked_linear_reference
from tests.ops.tolerance import assert_near_float64, holding_rows, output_and_gradients

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu_tanh"]
# leading shape of gate, in_features, out_features, rows
SHAPES = [
    ((1,), 1, 1, 1),
    ((2, 5), 63, 129, 30),
    ((), 129, 63, 7),
    ((3,), 500, 63, 63),
    ((4,), 63, 129, 0),
    ((0,), 63, 129, 5),
]
GRADIENTS = ("gate", "up", "rows", "bias")


make = partial(holding_rows, ("gate", "up"))
run = partial(output_and_gradients, wanted=GRADIENTS)


def assert_two_references(inputs, **options):
    shape = (*inputs["gate"].shape[:-1], inputs["weight"].shape[0])
    upstream = torch.randn(shape).to(inputs["weight"].dtype)
    floor = 1e-12 if inputs["gate"].dtype == torch.float64 else 1e-6
    pair = swiglu_row_masked_linear, swiglu_row_masked_linear_reference
    assert_near_float64(run, *pair, inputs, upstream, floor, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, bias, activation, dtype):
    if dtype.itemsize == 2:  # the rounding errors of a few numbers are too few to compare
        shape = ((16, *shape[0]), *shape[1:])
    assert_two_references(make(*shape, bias=bias, dtype=dtype), activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_rows_of_a_low_precision_weight(dtype):
    inputs = make((8,), 63, 129, 30, dtype=dtype, rows_dtype=torch.float32)
    assert_two_references(inputs)
    assert run(swiglu_row_masked_linear, inputs, torch.randn(8, 129))[3].dtype == torch.float32


@pytest.mark.parametrize("wanted", [("rows",), ("gate",), ("up", "bias"), ("gate", "rows")])
def test_any_subset_of_gradients(wanted):
    assert_two_references(make((4,), 63, 129, 30, dtype=torch.float64), wanted=wanted)


def test_non_contiguous():
    inputs = make((5, 6), 63, 129, 30)
    for name in ("gate", "up"):
        inputs[name] = inputs[name].transpose(0, 1)
    for name in ("weight", "rows"):
        inputs[name] = inputs[name].t().contiguous().t()
    assert_two_references(inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    inputs = make((2, 3), 5, 7, 3, dtype=torch.float64)
    gate, up, bias = (inputs.pop(n).requires_grad_() for n in ("gate", "up", "bias"))
    assert torch.autograd.gradcheck(
        lambda g, u, b: swiglu_row_masked_linear(g, u, bias=b, activation=activation, **inputs),
        (gate, up, bias),
    )


def test_keeps_no_product():
    inputs = make((4,), 63, 129, 30)
    for name in GRADIENTS:
        inputs[name].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        swiglu_row_masked_linear(**inputs)
    wide = [x for x in kept if x.shape == inputs["gate"].shape]
    assert {x.data_ptr() for x in wide} == {inputs[n].data_ptr() for n in ("gate", "up")}


def test_nothing_saved_is_written_over():
    inputs = make((4,), 63, 129, 30)
    before = {n: x.clone() for n, x in inputs.items()}
    wanted = [inputs[name].requires_grad_() for name in GRADIENTS]
    y = swiglu_row_masked_linear(**inputs)
    upstream = torch.randn_like(y)
    kept = upstream.clone()
    first = torch.autograd.grad(y, wanted, upstream, retain_graph=True)
    second = torch.autograd.grad(y, wanted, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(inputs[n], before[n]) for n in before)
    assert torch.equal(upstream, kept)


def test_optimizer_step_before_backward_raises():
    inputs = make((4,), 63, 129, 30)
    inputs["rows"].requires_grad_()
    y = swiglu_row_masked_linear(**inputs)
    inputs["rows"].grad = torch.ones_like(inputs["rows"])
    torch.optim.SGD([inputs["rows"]], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast():
    inputs = make((16,), 63, 129, 30)
    upstream = torch.randn(16, 129)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = run(swiglu_row_masked_linear, inputs, upstream)
    half = {n: x if n in ("index", "rows") else x.bfloat16() for n, x in inputs.items()}
    want = run(row_masked_of_product, half, upstream)
    assert [g.dtype for g in got] == [torch.bfloat16, *[torch.float32] * 4]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.float(), w.float(), rtol=2e-2, atol=2e-2)


def row_masked_of_product(gate, up, **others):
    return row_masked_linear((torch.nn.functional.silu(gate.float()) * up).bfloat16(), **others)


def test_compiles_whole():
    torch._dynamo.reset()
    inputs = make((4,), 63, 129, 30)
    compiled = torch.compile(swiglu_row_masked_linear, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(4, 129)
    got = run(compiled, inputs, upstream)
    for g, w in zip(got, run(swiglu_row_masked_linear, inputs, upstream), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("up", (4, 6)),
        ("weight", (7, 6)),
        ("rows", (4, 5)),
        ("rows", (3, 6)),
        ("index", (2,)),
        ("bias", (6,)),
    ],
)
def test_shapes_that_do_not_fit_raise(name, shape):
    inputs = make((4,), 5, 7, 3)
    inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    with pytest.raises(ValueError, match=r"fit|must be"):
        swiglu_row_masked_linear(**inputs)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'cublas'"):
        swiglu_row_masked_linear(**make((4,), 6, 5, 3), backend="cublas")
