from __future__ import annotations

from functools import partial

import pytest
import torch

from loki_kernels.ops import row_masked_linear
from loki_kernels.ops.row_masked_linear.reference import row_masked_linear_reference
from tests.ops.tolerance import (
    assert_near_float64,
    exact,
    holding_rows,
    output_and_gradients,
    relative,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# leading shape of x, in_features, out_features, rows
SHAPES = [
    ((1,), 1, 1, 1),
    ((2, 5), 63, 129, 30),
    ((), 129, 63, 7),
    ((3,), 500, 63, 63),
    ((2, 1, 3), 63, 500, 1),
    ((4,), 63, 129, 0),
    ((0,), 63, 129, 5),
]
GRADIENTS = ("x", "rows", "bias")


make = partial(holding_rows, ("x",))
run = partial(output_and_gradients, wanted=GRADIENTS)


def assert_two_references(inputs, floor=1e-6, wanted=GRADIENTS):
    shape = (*inputs["x"].shape[:-1], inputs["weight"].shape[0])
    upstream = torch.randn(shape).to(inputs["weight"].dtype)
    pair = row_masked_linear, row_masked_linear_reference
    assert_near_float64(run, *pair, inputs, upstream, floor, wanted=wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, bias, dtype):
    floor = 1e-12 if dtype == torch.float64 else 1e-6
    assert_two_references(make(*shape, bias=bias, dtype=dtype), floor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.float64])
def test_rows_of_a_higher_precision(dtype, rows_dtype):
    inputs = make((8,), 63, 129, 30, dtype=dtype, rows_dtype=rows_dtype)
    assert not torch.equal(inputs["rows"], inputs["weight"][inputs["index"]].to(rows_dtype))
    assert_two_references(inputs)
    assert run(row_masked_linear, inputs, torch.randn(8, 129))[2].dtype == rows_dtype


def test_non_contiguous():
    inputs = make((5, 6), 63, 129, 30)
    inputs["x"] = inputs["x"].transpose(0, 1)
    for name in ("weight", "rows"):
        inputs[name] = inputs[name].t().contiguous().t()
        assert not inputs[name].is_contiguous()
    inputs["index"] = inputs["index"].repeat_interleave(2)[::2]
    assert_two_references(inputs)


def test_expanded_output_gradient():
    """``y.sum()`` sends back a tensor of stride 0."""
    inputs = make((5, 6), 63, 129, 30, dtype=torch.float64)
    grads = []
    for op in (row_masked_linear, row_masked_linear_reference):
        leaves = {n: x.detach().clone() for n, x in inputs.items()}
        for name in GRADIENTS:
            leaves[name].requires_grad_()
        op(**leaves).sum().backward()
        grads.append([leaves[name].grad for name in GRADIENTS])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("wanted", [("rows",), ("x",), ("bias",), ("rows", "bias"), ("x", "rows")])
def test_any_subset_of_gradients(wanted):
    assert_two_references(make((4,), 63, 129, 30, dtype=torch.float64), 1e-12, wanted)


def test_other_inputs_get_no_gradient():
    inputs = make((4,), 63, 129, 30)
    inputs["weight"].requires_grad_()
    inputs["rows"].requires_grad_()
    row_masked_linear(**inputs).sum().backward()
    assert inputs["weight"].grad is None
    assert inputs["x"].grad is None
    assert inputs["rows"].grad is not None


def test_gradcheck_of_x_and_bias():
    inputs = make((2, 3), 5, 7, 3, dtype=torch.float64)
    weight, rows, index = inputs["weight"], inputs["rows"], inputs["index"]
    assert torch.autograd.gradcheck(
        lambda x, bias: row_masked_linear(x, weight, rows, index, bias),
        (inputs["x"].requires_grad_(), inputs["bias"].requires_grad_()),
    )


def test_rows_gradient_by_finite_differences():
    """The rows are moved together with the weight that holds them."""
    inputs = make((2, 3), 5, 7, 3, dtype=torch.float64)
    upstream = torch.randn(2, 3, 7, dtype=torch.float64)
    gradient = run(row_masked_linear, inputs, upstream)[2]
    step = torch.randn_like(inputs["rows"])

    def loss(t):
        rows = inputs["rows"] + t * step
        weight = inputs["weight"].index_copy(0, inputs["index"], rows)
        return float(
            (row_masked_linear(**(inputs | {"rows": rows, "weight": weight})) * upstream).sum()
        )

    assert (loss(1e-3) - loss(-1e-3)) / 2e-3 == pytest.approx(float((gradient * step).sum()))


def test_nothing_saved_is_written_over():
    inputs = make((4,), 63, 129, 30)
    before = {name: x.clone() for name, x in inputs.items()}
    wanted = [inputs[name].requires_grad_() for name in GRADIENTS]
    y = row_masked_linear(**inputs)
    upstream = torch.randn_like(y)
    kept = upstream.clone()
    first = torch.autograd.grad(y, wanted, upstream, retain_graph=True)
    second = torch.autograd.grad(y, wanted, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(inputs[name], before[name]) for name in before)
    assert torch.equal(upstream, kept)


@pytest.mark.parametrize("changed", ["rows", "weight", "x"])
def test_in_place_change_before_backward_raises(changed):
    inputs = make((4,), 63, 129, 30)
    leaf = {name: inputs[name].clone().requires_grad_() for name in ("x", "rows")}
    inputs |= {name: x * 1 for name, x in leaf.items()}
    y = row_masked_linear(**inputs)
    with torch.no_grad():
        inputs[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(bias, dtype):
    inputs = make((2, 4), 63, 129, 30, bias=bias, dtype=dtype, rows_dtype=torch.float32)
    upstream = torch.randn(2, 4, 129)
    best = run(row_masked_linear_reference, exact(inputs), upstream)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        same = run(row_masked_linear_reference, inputs, upstream)
        got = run(row_masked_linear, inputs, upstream)
    assert got[0].dtype == torch.bfloat16
    for g, s, e in zip(got, same, best, strict=True):
        assert g.dtype == s.dtype
        assert 0 < relative(g, e) < 2 * relative(s, e) + 1e-6


def test_autocast_backward_outside_the_context():
    inputs = make((4,), 63, 129, 30)
    for name in GRADIENTS:
        inputs[name].requires_grad_()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = row_masked_linear(**inputs)
    y.float().sum().backward()
    want = run(row_masked_linear_reference, exact(inputs), torch.ones(4, 129))
    for name, e in zip(GRADIENTS, want[1:], strict=True):
        assert inputs[name].grad.dtype == torch.float32
        assert relative(inputs[name].grad, e) < 0.01


@pytest.mark.parametrize("bias", [True, False])
def test_compiles_whole(bias):
    torch._dynamo.reset()
    inputs = make((4,), 63, 129, 30, bias=bias)
    compiled = torch.compile(row_masked_linear, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(4, 129)
    got = run(compiled, inputs, upstream)
    for g, w in zip(got, run(row_masked_linear, inputs, upstream), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (4, 6)),
        ("weight", (7, 6)),
        ("weight", (5,)),
        ("weight", (1, 7, 5)),
        ("rows", (4, 5)),
        ("rows", (3, 6)),
        ("rows", (3,)),
        ("index", (2,)),
        ("index", (3, 3)),
        ("bias", (6,)),
    ],
)
def test_shapes_that_do_not_fit_raise(name, shape):
    inputs = make((4,), 5, 7, 3)
    inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    with pytest.raises(ValueError, match=r"fit|must be"):
        row_masked_linear(**inputs)
