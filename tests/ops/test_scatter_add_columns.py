from __future__ import annotations

import pytest
import torch
from torch import library as torch_library

from loki_kernels.ops import scatter_add_columns
from loki_kernels.ops.scatter_add_columns.reference import scatter_add_columns_reference
from tests.ops.tolerance import assert_as_close, example

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# tokens, width, selected columns, rank
SIZES = [(1, 1, 1, 1), (63, 129, 20, 4), (5, 129, 129, 63), (129, 63, 7, 500)]


def make(tokens, width, k, rank, dtype=torch.float32):
    torch.manual_seed(tokens + width + k + rank)
    y, u, v = (torch.randn(s).to(dtype) for s in ((tokens, width), (tokens, rank), (k, rank)))
    return {"y": y, "index": torch.randperm(width)[:k], "u": u, "v": v}


def assert_two_references(inputs):
    double = {n: x if n == "index" else x.double() for n, x in inputs.items()}
    best = scatter_add_columns_reference(**double | {"y": double["y"].clone()})
    same = scatter_add_columns_reference(**inputs | {"y": inputs["y"].clone()})
    got = inputs["y"].clone(memory_format=torch.preserve_format)
    assert scatter_add_columns(**inputs | {"y": got}) is got
    assert_as_close([got], [same], [best], 1e-12 if got.dtype == torch.float64 else 1e-6)
    others = torch.ones(got.shape[1], dtype=torch.bool)
    others[inputs["index"]] = False
    assert torch.equal(got[:, others], inputs["y"][:, others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_reference(size, dtype):
    assert_two_references(make(*size, dtype=dtype))


@pytest.mark.parametrize("size", [(0, 9, 3, 2), (4, 9, 0, 2), (4, 9, 3, 0)])
def test_nothing_to_add(size):
    inputs = make(*size)
    before = inputs["y"].clone()
    assert torch.equal(scatter_add_columns(**inputs), before)


def test_non_contiguous():
    inputs = make(20, 129, 63, 40)
    inputs = {n: x if n == "index" else x.t().contiguous().t() for n, x in inputs.items()}
    inputs["index"] = inputs["index"].repeat_interleave(2)[::2]
    assert not any(x.is_contiguous() for x in inputs.values())
    assert_two_references(inputs)


def test_no_gradient():
    y = torch.zeros(3, 4)
    u, v = torch.ones(3, 2, requires_grad=True), torch.ones(2, 2)
    assert not scatter_add_columns(y, torch.tensor([0, 2]), u, v).requires_grad


def test_operands_are_left_alone():
    inputs = make(9, 63, 20, 4)
    before = {n: x.clone() for n, x in inputs.items()}
    scatter_add_columns(**inputs)
    assert all(torch.equal(inputs[n], before[n]) for n in ("index", "u", "v"))


def test_registration():
    inputs = example("scatter_add_columns")
    torch_library.opcheck(
        torch.ops.loki_kernels.scatter_add_columns.default, (*inputs.values(), None)
    )


def test_compiles_whole():
    torch._dynamo.reset()
    inputs = example("scatter_add_columns")
    want = scatter_add_columns_reference(**inputs | {"y": inputs["y"].clone()})
    compiled = torch.compile(scatter_add_columns, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), want)
    torch.testing.assert_close(inputs["y"], want)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("y", (9,), "y must be"),
        ("u", (4,), r"u \[tokens, r\]; they are \[4, 9\] and \[4\]"),
        ("u", (3, 2), r"u must be \[4, 2\]; it is \[3, 2\]"),
        ("v", (3, 3), "v must be"),
        ("v", (4, 2), "v must be"),
        ("index", (2,), "v must be"),
    ],
)
def test_shapes_that_do_not_fit_raise(name, shape, message):
    inputs = make(4, 9, 3, 2)
    inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    with pytest.raises(ValueError, match=message):
        scatter_add_columns(**inputs)


def test_mixed_dtypes_raise():
    with pytest.raises(ValueError, match="share a dtype"):
        scatter_add_columns(**make(4, 9, 3, 2) | {"u": torch.zeros(4, 2, dtype=torch.float64)})
