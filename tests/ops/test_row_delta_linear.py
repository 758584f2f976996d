from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from loki_kernels.ops import row_delta_linear
from loki_kernels.ops._directions import acting_factors
from loki_kernels.ops.row_delta_linear.reference import row_delta_linear_reference
from tests.ops.tolerance import (
    assert_near_float64,
    in_float64,
    output_and_gradients,
    protected,
    relative,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# leading shape of x, in_features, out_features, rows, rank
SHAPES = [
    ((1,), 1, 1, 1, 1),
    ((2, 5), 63, 129, 30, 4),
    ((), 129, 63, 7, 3),
    ((3,), 500, 63, 63, 2),
    ((7,), 63, 500, 2, 63),
    ((4,), 63, 129, 0, 2),
    ((4,), 63, 129, 5, 0),
    ((0,), 63, 129, 5, 2),
]
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def few_tokens_are_enough(monkeypatch):
    """To form the sum of weight and update."""
    monkeypatch.setattr(importlib.import_module(row_delta_linear.__module__), "_TOKENS", 4)


GRADIENTS = ("x", "delta_a", "delta_b", "bias")


def make(lead, in_features, out_features, k, rank, bias=True, dtype=torch.float32):
    torch.manual_seed(in_features + out_features + k)
    return {
        "x": torch.randn(*lead, in_features).to(dtype),
        "weight": torch.randn(out_features, in_features).to(dtype),
        "delta_a": torch.randn(k, rank).to(dtype),
        "delta_b": torch.randn(rank, in_features).to(dtype),
        "index": torch.randperm(out_features)[:k],
        "bias": torch.randn(out_features).to(dtype) if bias else None,
    }


run = partial(output_and_gradients, wanted=GRADIENTS)


def assert_few_roundings(inputs):
    """Every result is one number, which five roundings lead to at most.

    Two references say nothing of it: the reference's error is 0 where its roundings happen to be
    exact, and ours, rounded once more, is then allowed none. Each rounding is off by half an eps of
    what it rounds, which is at most what the absolute values of the terms add up to; the other half
    is left to the float64 answer and to subnormal numbers.
    """
    upstream = torch.randn(1, 1).to(inputs["x"].dtype)
    sizes = {n: x if x is None or n == "index" else x.abs() for n, x in inputs.items()}
    exact = run(row_delta_linear_reference, in_float64(inputs), upstream)
    terms = run(row_delta_linear_reference, in_float64(sizes), upstream.abs())
    limits = torch.finfo(upstream.dtype)
    for g, e, size in zip(run(row_delta_linear, inputs, upstream), exact, terms, strict=True):
        assert g.dtype == upstream.dtype
        assert ((g.double() - e).abs() <= 5 * limits.eps * (size + limits.smallest_normal)).all()


def assert_two_references(inputs, floor=1e-6):
    if inputs["weight"].numel() == 1:
        return assert_few_roundings(inputs)
    shape = (*inputs["x"].shape[:-1], inputs["weight"].shape[0])
    upstream = torch.randn(shape).to(inputs["weight"].dtype)
    pair = row_delta_linear, row_delta_linear_reference
    assert_near_float64(run, *pair, inputs, upstream, floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, bias, dtype):
    floor = 1e-12 if dtype == torch.float64 else 1e-6
    assert_two_references(make(*shape, bias=bias, dtype=dtype), floor)


def test_is_the_dense_sum():
    inputs = make((4,), 63, 129, 30, 4, dtype=torch.float64)
    weight = inputs["weight"].clone()
    for i, row in enumerate(inputs["index"].tolist()):
        weight[row] += inputs["delta_a"][i] @ inputs["delta_b"]
    want = inputs["x"] @ weight.t() + inputs["bias"]
    torch.testing.assert_close(row_delta_linear(**inputs), want)


def test_non_contiguous():
    inputs = make((5, 6), 63, 129, 30, 4)
    inputs["x"] = inputs["x"].transpose(0, 1)
    for name in ("weight", "delta_a", "delta_b"):
        inputs[name] = inputs[name].t().contiguous().t()
        assert not inputs[name].is_contiguous()
    inputs["index"] = inputs["index"].repeat_interleave(2)[::2]
    assert_two_references(inputs)


def test_gradcheck():
    inputs = make((2, 3), 5, 7, 3, 2, dtype=torch.float64)
    weight, index = inputs["weight"], inputs["index"]
    wanted = [inputs[name].requires_grad_() for name in GRADIENTS]
    assert torch.autograd.gradcheck(
        lambda x, a, b, bias: row_delta_linear(x, weight, a, b, index, bias), wanted
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_delta_on_a_low_precision_weight(dtype):
    inputs = make((8,), 63, 129, 30, 4, dtype=dtype)
    for name in ("delta_a", "delta_b"):
        inputs[name] = inputs[name].float()
    assert_two_references(inputs)
    assert row_delta_linear(**inputs).dtype == dtype


def test_autocast_leaves_float64():
    inputs = make((5,), 30, 20, 4, 3, dtype=torch.float64)
    want = row_delta_linear(**inputs)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert torch.equal(row_delta_linear(**inputs), want)


def test_autocast():
    inputs = make((2, 4), 63, 129, 30, 4)
    upstream = torch.randn(2, 4, 129)
    exact = run(row_delta_linear_reference, in_float64(inputs), upstream)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        same = run(row_delta_linear_reference, inputs, upstream)
        got = run(row_delta_linear, inputs, upstream)
    assert got[0].dtype == torch.bfloat16
    for g, s, e in zip(got, same, exact, strict=True):
        assert g.dtype == s.dtype
        assert 0 < relative(g, e) < 2 * relative(s, e) + 1e-6


MANY = ((2, 5), 63, 129, 65, 4)  # half of the rows and more, of which the sum is formed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*(s for s in SHAPES if s[4]), MANY])
def test_dense_delta(shape, dtype):
    inputs = make(*shape, dtype=dtype)
    inputs |= {"delta_a": torch.randn(shape[3], shape[1]).to(dtype), "delta_b": None}
    assert_two_references(inputs, 1e-12 if dtype == torch.float64 else 1e-6)


def test_dense_delta_gradcheck():
    inputs = make((2, 3), 5, 7, 3, 2, dtype=torch.float64)
    x, bias = (inputs[n].requires_grad_() for n in ("x", "bias"))
    delta = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, d, b: row_delta_linear(x, inputs["weight"], d, None, inputs["index"], b),
        (x, delta, bias),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dense", "k"), [(False, 30), (True, 30), (True, 65)])
def test_protected_directions(dense, k, dtype):
    inputs = make((2, 5), 63, 129, k, 4, dtype=dtype)
    if dense:
        delta = torch.randn(k, 63).to(dtype)
        inputs |= {"delta_a": delta, "delta_b": None}
    assert_two_references(protected(inputs, 9), 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("dense", "k"), [(False, 3), (True, 3), (True, 5)])
def test_protected_gradcheck(dense, k):
    inputs = protected(make((2, 3), 5, 7, k, 2, dtype=torch.float64), 2)
    if dense:
        inputs |= {"delta_a": torch.randn(k, 5, dtype=torch.float64), "delta_b": None}
    wanted = [inputs[n].requires_grad_() for n in GRADIENTS if inputs[n] is not None]

    def run_it(*leaves):
        named = dict(zip((n for n in GRADIENTS if inputs[n] is not None), leaves, strict=True))
        return row_delta_linear(**(inputs | named))

    assert torch.autograd.gradcheck(run_it, wanted)


@pytest.mark.parametrize("k", [30, 65, 129])
def test_what_is_formed_is_not_kept_for_the_backward_pass(k):
    """But the parameter itself: of all rows what is formed is as large as the weights."""
    inputs = protected(make((8,), 63, 129, k, 4), 9)
    inputs |= {"delta_a": torch.randn(k, 63, requires_grad=True), "delta_b": None}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        row_delta_linear(**inputs)
    own = {t.data_ptr() for t in inputs.values() if isinstance(t, torch.Tensor)}
    assert inputs["delta_a"].data_ptr() in {t.data_ptr() for t in kept}
    assert all(t.data_ptr() in own for t in kept)


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_that_selective_checkpointing_keeps_is_added_to_once(bias):
    """The layer runs again, on what ``mm`` gave the first time."""
    kept = [aten.mm.default, aten.addmm.default]
    inputs = make((2, 5), 63, 129, 30, 4, bias=bias)

    def gradients(run):
        x = inputs["x"].clone().requires_grad_()
        run(x).pow(3).sum().backward()
        return x.grad

    def block(x):  # as Gemma 3 has a norm after the layer
        y = row_delta_linear(**(inputs | {"x": x}))
        return torch.nn.functional.layer_norm(y, y.shape[-1:])

    def again(x):
        contexts = partial(create_selective_checkpoint_contexts, kept)
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    torch.testing.assert_close(gradients(again), gradients(block))


@pytest.mark.parametrize(("dense", "k"), [(False, 30), (True, 30), (True, 129)])
def test_directions_are_no_activation(dense, k):
    """What offloads activations would send them to the host and back in every layer."""
    inputs = protected(make((8,), 63, 129, k, 4), 9)
    if dense:
        inputs |= {"delta_a": torch.randn(k, 63), "delta_b": None}
    upstream, moved = torch.randn(8, 129), []
    want = run(row_delta_linear, inputs, upstream)

    def move(tensor):
        moved.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(move, lambda t: t):
        got = run(row_delta_linear, inputs, upstream)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert moved
    assert inputs["directions"].data_ptr() not in {t.data_ptr() for t in moved}


@pytest.mark.parametrize(
    ("tokens", "k", "products"), [(8, 30, 5), (8, 65, 3), (8, 129, 3), (3, 129, 5)]
)
def test_of_many_rows_one_product_is_made_with_the_sum(tokens, k, products):
    inputs = make((tokens,), 63, 129, k, 4)
    inputs |= {"delta_a": torch.randn(k, 63, requires_grad=True), "delta_b": None}
    inputs["x"].requires_grad_()
    made = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
                made.append(function)
            return function(*args, **(kwargs or {}))

    with Count():
        row_delta_linear(**inputs).sum().backward()
    assert len(made) == products


@pytest.mark.parametrize("directions", [0, 9])
def test_the_sum_is_rounded_once_under_autocast(directions):
    inputs = make((8,), 63, 129, 129, 4)
    inputs |= {"delta_a": torch.randn(129, 63) / 500, "delta_b": None, "bias": None}
    inputs = protected(inputs, directions) if directions else inputs
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = row_delta_linear(**inputs)
    acting = acting_factors(inputs["delta_a"], None, inputs.get("directions"))[0]
    whole = inputs["weight"].index_add(0, inputs["index"], acting)
    assert torch.equal(got, inputs["x"].bfloat16() @ whole.bfloat16().t())


@pytest.mark.parametrize("wanted", [("delta_a",), ("delta_b",), ("x",), ("bias",)])
def test_any_subset_of_gradients(wanted):
    inputs = make((4,), 63, 129, 30, 4, dtype=torch.float64)
    upstream = torch.randn(4, 129, dtype=torch.float64)
    whole = dict(zip(GRADIENTS, run(row_delta_linear, inputs, upstream)[1:], strict=True))
    leaf = inputs[wanted[0]].requires_grad_()
    (got,) = torch.autograd.grad(row_delta_linear(**inputs), leaf, upstream)
    torch.testing.assert_close(got, whole[wanted[0]])


@pytest.mark.parametrize("directions", [0, 9])
@pytest.mark.parametrize(("dense", "k"), [(False, 30), (True, 30), (True, 65), (True, 129)])
def test_compiles_whole(dense, k, directions):
    torch._dynamo.reset()
    inputs = make((4,), 63, 129, k, 4)
    if dense:
        inputs |= {"delta_a": torch.randn(k, 63), "delta_b": None}
    if directions:
        inputs = protected(inputs, directions)
    compiled = torch.compile(row_delta_linear, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(4, 129)
    got = run(compiled, inputs, upstream)
    for g, w in zip(got, run(row_delta_linear, inputs, upstream), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("k", [30, 129])
def test_compiles_with_a_float32_update_of_a_bfloat16_weight(k):
    torch._dynamo.reset()
    inputs = protected(make((8,), 63, 129, k, 4, dtype=torch.bfloat16), 9)
    inputs |= {"delta_a": torch.randn(k, 63), "delta_b": None}
    upstream = torch.randn(8, 129)
    compiled = torch.compile(row_delta_linear, fullgraph=True, backend="aot_eager")
    for g, w in zip(
        run(compiled, inputs, upstream), run(row_delta_linear, inputs, upstream), strict=True
    ):
        assert g.dtype == w.dtype
        assert relative(g, w.double()) < 0.01


def test_weight_is_not_written():
    inputs = make((4,), 63, 129, 30, 4)
    before = inputs["weight"].clone()
    run(row_delta_linear, inputs, torch.randn(4, 129))
    assert torch.equal(inputs["weight"], before)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("delta_a", (4, 2)),
        ("delta_a", (3, 1)),
        ("delta_b", (2, 6)),
        ("delta_b", (1, 5)),
        ("index", (2,)),
        ("x", (4, 6)),
        ("bias", (6,)),
        ("delta_a", (3,)),
        ("delta_b", None),
        ("directions", (4, 1)),
        ("directions", (5,)),
    ],
)
def test_shapes_that_do_not_fit_raise(name, shape):
    inputs = make((4,), 5, 7, 3, 2)
    like = inputs.get(name, inputs["x"])
    inputs[name] = None if shape is None else torch.zeros(shape, dtype=like.dtype)
    with pytest.raises(ValueError, match=r"fit|must be"):
        row_delta_linear(**inputs)
