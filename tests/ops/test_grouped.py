"""Products of tokens sorted by expert, against one dense product an expert."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loki_kernels.ops import _grouped
from loki_kernels.ops._grouped import Update, grouped_linear
from tests.ops.tolerance import assert_near_float64, output_and_gradients, protected

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# in_features, out_features, rows, tokens of each expert
SHAPES = [
    (16, 24, 5, [3, 0, 6, 1]),
    (15, 23, 5, [3, 0, 6, 1]),  # no line begins at a multiple of 16 bytes
    (8, 8, 8, [0, 0, 7]),
    (16, 9, 1, [1]),
    (16, 24, 0, [2, 3]),
    (16, 24, 3, [0, 0]),
]


def reference(x, weight, offsets, update, index, directions=None, b=None):
    """In plain torch, with the sum that is never formed."""
    update = update if b is None else update @ b
    if directions is not None:
        update = update - update @ directions @ directions.mT
    merged = weight.index_add(1, index, update.to(weight.dtype))
    starts = [0, *offsets.tolist()[:-1]]
    parts = zip(merged, starts, offsets.tolist(), strict=True)
    return torch.cat([x[start:end] @ matrix.t() for matrix, start, end in parts])


def make(in_features, out_features, k, tokens, dtype=torch.float32, transposed=False):
    torch.manual_seed(in_features + k)
    shape = (len(tokens), in_features, out_features)
    weight = torch.randn(shape).to(dtype).transpose(1, 2)
    return {
        "x": torch.randn(sum(tokens), in_features).to(dtype),
        "weight": weight if transposed else weight.contiguous(),
        "offsets": torch.tensor(tokens).cumsum(0).to(torch.int32),
        "update": torch.randn(len(tokens), k, in_features).to(dtype),
        "index": torch.randperm(out_features)[:k],
    }


def ours(x, weight, offsets, update, index, directions=None, b=None):
    return grouped_linear(x, weight, offsets, Update(update, index, directions, b))


def of_rank(inputs, rank):
    """The same with an update of two factors."""
    experts, k, width = inputs["update"].shape
    dtype = inputs["x"].dtype
    factors = {"update": torch.randn(experts, k, rank), "b": torch.randn(experts, rank, width)}
    return inputs | {name: factor.to(dtype) for name, factor in factors.items()}


run = partial(output_and_gradients, wanted=("x", "update"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("loop", [False, True])
def test_is_the_dense_product(dtype, shape, transposed, loop, monkeypatch):
    inputs = make(*shape, dtype=dtype, transposed=transposed)
    if loop:
        monkeypatch.setattr(_grouped, "_why_loop", lambda *_: "asked for")
    upstream = torch.randn(len(inputs["x"]), shape[1]).to(dtype)
    assert_near_float64(run, ours, reference, inputs, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_protected_directions(shape, dtype):
    inputs = protected(make(*shape, dtype=dtype), 3)
    upstream = torch.randn(len(inputs["x"]), shape[1]).to(dtype)
    assert_near_float64(run, ours, reference, inputs, upstream, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_low_rank(shape, count, dtype):
    inputs = of_rank(make(*shape, dtype=dtype), 2)
    inputs = protected(inputs, count) if count else inputs
    upstream = torch.randn(len(inputs["x"]), shape[1]).to(dtype)
    run = partial(output_and_gradients, wanted=("x", "update", "b"))
    assert_near_float64(run, ours, reference, inputs, upstream, 1e-5)


@pytest.mark.parametrize("rank", [None, 2])
def test_neither_the_acting_update_nor_directions_are_saved_for_the_backward_pass(rank):
    inputs = protected(make(16, 24, 5, [3, 4]), 3)
    inputs = inputs if rank is None else of_rank(inputs, rank)
    inputs["update"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(**inputs)
    own = {t.data_ptr() for name, t in inputs.items() if name != "directions"}
    assert kept
    assert all(t.data_ptr() in own for t in kept)


def test_uses_torchs_product_where_it_can():
    inputs = make(16, 24, 5, [3, 4], torch.bfloat16)
    matrices = inputs["weight"].transpose(1, 2)
    assert _grouped._why_loop(inputs["x"], matrices) is None
    assert "multiples of 16 bytes" in _grouped._why_loop(inputs["x"][:, 1:], matrices[:, 1:])
    assert "float64" in _grouped._why_loop(inputs["x"].double(), matrices.double())


def test_a_group_without_tokens_has_no_gradient_whatever_the_product_leaves_there(monkeypatch):
    """The kernels that leave its block as memory was are a GPU's; NaN stands in for what was."""
    product, left = torch.nn.functional.grouped_mm, []

    def leaves_empty_groups(a, b, *, offs):
        y = product(a, b, offs=offs)
        if y.ndim == 3:  # the other products have a line a token, and of an empty group none
            empty = offs == torch.cat([offs.new_zeros(1), offs[:-1]])
            y[empty] = torch.nan
            left.append(int(empty.sum()))
        return y

    inputs = make(16, 24, 5, [0, 3, 0, 4, 0], torch.bfloat16)
    upstream = torch.randn(7, 24).to(torch.bfloat16)
    want = run(ours, inputs, upstream)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaves_empty_groups)
    for got, same in zip(run(ours, inputs, upstream), want, strict=True):
        torch.testing.assert_close(got, same, rtol=0, atol=0)
    assert left == [3]


def test_a_float32_update_of_16_bit_weights_has_a_float32_gradient():
    inputs = make(16, 24, 5, [3, 4], torch.bfloat16)
    update = inputs["update"].float().requires_grad_()
    y = ours(**(inputs | {"update": update}))
    assert y.dtype == torch.bfloat16
    y.sum().backward()  # of an expanded gradient, which torch's product refuses
    assert update.grad.dtype == torch.float32


def test_without_an_update_it_keeps_no_tokens():
    inputs = make(16, 24, 5, [3, 4])
    x = inputs["x"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = grouped_linear(x, inputs["weight"], inputs["offsets"])
    assert not any(t.shape == x.shape for t in kept)
    y.sum().backward()
    want = torch.cat([inputs["weight"][0].sum(0).expand(3, -1), inputs["weight"][1].sum(0)[None]])
    torch.testing.assert_close(x.grad[:4], want)


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that an operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            is_new = isinstance(made, torch.Tensor) and made.numel()
            if is_new and made.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, made.numel())
        return result


@pytest.mark.parametrize("loop", [False, True])
def test_never_forms_a_gradient_of_all_rows(loop, monkeypatch):
    """64 experts of [40, 16], 16 rows of each, few tokens: the update is the largest thing."""
    if loop:
        monkeypatch.setattr(_grouped, "_why_loop", lambda *_: "asked for")
    inputs = make(16, 40, 16, [1] * 64)
    wanted = [inputs[name].requires_grad_() for name in ("x", "update")]
    with Largest() as forward:
        y = ours(**inputs)
    with Largest() as backward:
        y.backward(torch.randn_like(y))
    assert all(w.grad is not None for w in wanted)
    assert max(forward.elements, backward.elements) == 64 * 16 * 16 < inputs["weight"].numel()


@pytest.mark.parametrize("directions", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_to_one_graph(dtype, directions):
    torch._dynamo.reset()
    inputs = make(16, 24, 5, [3, 0, 4], dtype)
    if directions:
        inputs = protected(inputs, directions)
    upstream = torch.randn(7, 24).to(dtype)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled, inputs, upstream), run(ours, inputs, upstream), strict=True):
        torch.testing.assert_close(
            got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )


def test_has_first_derivatives_only():
    inputs = make(16, 24, 5, [3, 4])
    y = ours(**(inputs | {"x": inputs["x"].requires_grad_()}))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
