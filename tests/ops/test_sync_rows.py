from __future__ import annotations

import pytest
import torch

from loki_kernels.ops import sync_rows
from loki_kernels.ops.sync_rows.reference import sync_rows_reference
from tests.ops.tolerance import example

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# out_features, in_features, rows of each layer: odd, a multiple of the vector, no row, one element
LAYERS = [(9, 33, 4), (12, 264, 12), (7, 33, 0), (3, 1, 2), (5, 2057, 3)]


def make(weight_dtype, rows_dtype, layers=LAYERS):
    torch.manual_seed(0)
    weights = [torch.randn(m, n).to(weight_dtype) for m, n, _ in layers]
    rows = [torch.randn(k, n).to(rows_dtype) for _, n, k in layers]
    return weights, rows, [torch.randperm(m)[:k] for m, _, k in layers]


def assert_equals_reference(weights, rows, indices):
    want = sync_rows_reference([w.clone() for w in weights], rows, indices)
    got = [w.clone(memory_format=torch.preserve_format) for w in weights]
    returned = sync_rows(got, rows, indices)
    assert all(r is g for r, g in zip(returned, got, strict=True))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("rows_dtype", DTYPES)
def test_equals_reference(weight_dtype, rows_dtype):
    assert_equals_reference(*make(weight_dtype, rows_dtype))


def test_more_layers_than_a_launch_takes():
    layers = [(5, 8, 1 + i % 3) for i in range(131)]
    assert_equals_reference(*make(torch.bfloat16, torch.float32, layers))


def test_non_contiguous():
    weights, rows, indices = make(torch.bfloat16, torch.float32)
    wide = [torch.zeros(w.shape[0], w.shape[1] + 3, dtype=w.dtype)[:, 1:-2] for w in weights]
    for target, weight in zip(wide, weights, strict=True):
        target.copy_(weight)
    rows = [r.t().contiguous().t() for r in rows]
    indices = [i.repeat_interleave(2)[::2] for i in indices]
    want = sync_rows_reference([w.clone() for w in weights], rows, indices)
    sync_rows(wide, rows, indices)  # in place: a clone would be contiguous
    assert all(torch.equal(g, w) for g, w in zip(wide, want, strict=True))
    columns_first = [w.t().contiguous().t() for w in weights]
    assert_equals_reference(columns_first, rows, indices)


def test_what_is_not_finite_stays():
    inf = float("inf")
    rows = torch.tensor([[inf, -inf, float("nan"), 0.0, -0.0, 3.4e38, 1e-40, -1e-40]])
    weight = torch.zeros(1, 8, dtype=torch.bfloat16)
    sync_rows([weight], [rows], [torch.zeros(1, dtype=torch.int64)])
    assert weight[0, 0] == inf
    assert weight[0, 1] == -inf
    assert weight[0, 2].isnan()
    assert weight[0, 3] == weight[0, 4] == 0
    assert (weight[0, 6:].abs() < 2e-40).all()


def test_no_gradient():
    weight, rows = torch.zeros(4, 3), torch.ones(1, 3, requires_grad=True)
    sync_rows([weight], [rows], [torch.tensor([2])])
    assert not weight.requires_grad
    assert weight[2].tolist() == [1, 1, 1]


def test_no_layers():
    assert sync_rows([], [], []) == []


def test_registration():
    inputs = [*example("sync_rows").values(), None]
    torch.library.opcheck(
        torch.ops.loki_kernels.sync_rows.default,
        tuple(inputs),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_whole():
    torch._dynamo.reset()
    weights, rows, indices = make(torch.bfloat16, torch.float32)
    want = sync_rows_reference([w.clone() for w in weights], rows, indices)
    torch.compile(sync_rows, fullgraph=True, backend="aot_eager")(weights, rows, indices)
    assert all(torch.equal(g, w) for g, w in zip(weights, want, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "equally many"),
        ({"weights": [torch.zeros(9)]}, "a weight must be"),
        ({"rows": [torch.zeros(4, 32)]}, "rows must be"),
        ({"indices": [torch.zeros(3, dtype=torch.int64)]}, "rows must be"),
    ],
)
def test_bad_input_raises(change, message):
    weights, rows, indices = make(torch.bfloat16, torch.float32, LAYERS[:1])
    with pytest.raises(ValueError, match=message):
        sync_rows(**{"weights": weights, "rows": rows, "indices": indices} | change)


def test_mixed_dtypes_raise():
    weights, rows, indices = make(torch.bfloat16, torch.float32, LAYERS[:2])
    with pytest.raises(ValueError, match="weights must share a device and a dtype"):
        sync_rows([weights[0], weights[1].float()], rows, indices)
