from __future__ import annotations

import pytest
import torch

from loki_kernels.ops import gather_columns
from loki_kernels.ops.gather_columns.reference import gather_columns_reference
from tests.ops.tolerance import example

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "k"), [(1, 1, 1), (63, 129, 20), (129, 500, 500)])
def test_equals_reference(rows, width, k, dtype):
    torch.manual_seed(rows)
    x, index = torch.randn(rows, width).to(dtype), torch.randperm(width)[:k]
    for order in (index, index.sort().values):
        got = gather_columns(x, order)
        assert got.stride(1) == 1
        assert got.stride(0) * got.element_size() % 16 == got.data_ptr() % 16 == 0
        assert torch.equal(got, gather_columns_reference(x, order))


@pytest.mark.parametrize(("rows", "k"), [(0, 3), (4, 0)])
def test_nothing_to_gather(rows, k):
    got = gather_columns(torch.zeros(rows, 9), torch.arange(k))
    assert got.shape == (rows, k)


def test_non_contiguous():
    x, index = torch.randn(129, 63).t()[::2], torch.randperm(129).repeat_interleave(2)[::2]
    assert not x.is_contiguous()
    assert torch.equal(gather_columns(x, index), x[:, index])
    expanded = torch.randn(1, 1).expand(7, 129)
    assert torch.equal(gather_columns(expanded, index), expanded)


def test_registration():
    inputs = example("gather_columns")
    torch.library.opcheck(torch.ops.loki_kernels.gather_columns.default, (*inputs.values(), None))


def test_compiles_whole():
    torch._dynamo.reset()
    inputs = example("gather_columns")
    compiled = torch.compile(gather_columns, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), gather_columns_reference(**inputs))


@pytest.mark.parametrize(
    ("x", "index", "message"),
    [((5,), (2,), "x must be"), ((2, 3, 5), (2,), "x must be"), ((3, 5), (2, 2), "index must be")],
)
def test_shapes_that_do_not_fit_raise(x, index, message):
    with pytest.raises(ValueError, match=message):
        gather_columns(torch.zeros(x), torch.zeros(index, dtype=torch.int64))
