from __future__ import annotations

import pytest
import torch
from torch import library as torch_library

from loki_kernels.ops import sync_rows
from loki_kernels.ops.sync_rows.reference import sync_rows_reference
from tests.ops.tolerance import example

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# out_features, in_features, rows of each layer: odd, a multiple of the vector, no row, one element
LAYERS = [(9, 33, 4), (12, 264, 12), (7, 33, 0), (3, 1, 2), (5, 2057, 3)]


def make(weight_dtype, update_dtype, layers=LAYERS):
    """weights, base, updates and indices."""
    torch.manual_seed(0)
    weights = [torch.randn(m, n).to(weight_dtype) for m, n, _ in layers]
    base = [torch.randn(k, n).to(weight_dtype) for _, n, k in layers]
    updates = [0.01 * torch.randn(k, n).to(update_dtype) for _, n, k in layers]
    return weights, base, updates, [torch.randperm(m)[:k] for m, _, k in layers]


def assert_equals_reference(weights, *rest):
    want = sync_rows_reference([w.clone() for w in weights], *rest)
    got = [w.clone(memory_format=torch.preserve_format) for w in weights]
    returned = sync_rows(got, *rest)
    assert all(r is g for r, g in zip(returned, got, strict=True))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("update_dtype", DTYPES)
def test_equals_reference(weight_dtype, update_dtype):
    assert_equals_reference(*make(weight_dtype, update_dtype))


def test_a_small_update_survives_a_coarse_weight():
    """The sum with the base is formed in float32 and rounded once."""
    weight, base = torch.zeros(1, 8, dtype=torch.bfloat16), torch.ones(1, 8, dtype=torch.bfloat16)
    update = torch.full((1, 8), 2.0**-8 + 2.0**-17)  # bfloat16's 2^-8, with which 1 rounds to 1
    sync_rows([weight], [base], [update], [torch.zeros(1, dtype=torch.int64)])
    assert torch.equal(weight, torch.full_like(weight, 1 + 2.0**-7))


def test_more_layers_than_a_launch_takes():
    layers = [(5, 8, 1 + i % 3) for i in range(131)]
    assert_equals_reference(*make(torch.bfloat16, torch.float32, layers))


def test_non_contiguous():
    weights, base, updates, indices = make(torch.bfloat16, torch.float32)
    wide = [torch.zeros(w.shape[0], w.shape[1] + 3, dtype=w.dtype)[:, 1:-2] for w in weights]
    for target, weight in zip(wide, weights, strict=True):
        target.copy_(weight)
    base, updates = ([r.t().contiguous().t() for r in rows] for rows in (base, updates))
    indices = [i.repeat_interleave(2)[::2] for i in indices]
    want = sync_rows_reference([w.clone() for w in weights], base, updates, indices)
    sync_rows(wide, base, updates, indices)  # in place: a clone would be contiguous
    assert all(torch.equal(g, w) for g, w in zip(wide, want, strict=True))
    columns_first = [w.t().contiguous().t() for w in weights]
    assert_equals_reference(columns_first, base, updates, indices)


def test_what_is_not_finite_stays():
    inf = float("inf")
    update = torch.tensor([[inf, -inf, float("nan"), 0.0, -0.0, 3.4e38, 1e-40, -1e-40]])
    weight, base = torch.zeros(2, 1, 8, dtype=torch.bfloat16)
    sync_rows([weight], [base], [update], [torch.zeros(1, dtype=torch.int64)])
    assert weight[0, 0] == inf
    assert weight[0, 1] == -inf
    assert weight[0, 2].isnan()
    assert weight[0, 3] == weight[0, 4] == 0
    assert (weight[0, 6:].abs() < 2e-40).all()


def test_no_gradient():
    weight, base = torch.zeros(4, 3), torch.zeros(1, 3)
    update = torch.ones(1, 3, requires_grad=True)
    sync_rows([weight], [base], [update], [torch.tensor([2])])
    assert not weight.requires_grad
    assert weight[2].tolist() == [1, 1, 1]


def test_no_layers():
    assert sync_rows([], [], [], []) == []


def test_registration():
    inputs = [*example("sync_rows").values(), None]
    torch_library.opcheck(
        torch.ops.loki_kernels.sync_rows.default,
        tuple(inputs),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_whole():
    torch._dynamo.reset()
    weights, *rest = make(torch.bfloat16, torch.float32)
    want = sync_rows_reference([w.clone() for w in weights], *rest)
    torch.compile(sync_rows, fullgraph=True, backend="aot_eager")(weights, *rest)
    assert all(torch.equal(g, w) for g, w in zip(weights, want, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"updates": []}, "equally many"),
        ({"weights": [torch.zeros(9)]}, "a weight must be"),
        ({"base": [torch.zeros(4, 32)]}, "base must be"),
        ({"updates": [torch.zeros(4, 32)]}, "update must be"),
        ({"indices": [torch.zeros(3, dtype=torch.int64)]}, "base must be"),
        ({"base": [torch.zeros(4, 33)]}, "weights and base must share a device and a dtype"),
    ],
)
def test_bad_input_raises(change, message):
    names = "weights", "base", "updates", "indices"
    given = dict(zip(names, make(torch.bfloat16, torch.float32, LAYERS[:1]), strict=True))
    with pytest.raises(ValueError, match=message):
        sync_rows(**given | change)


def test_mixed_dtypes_raise():
    weights, *rest = make(torch.bfloat16, torch.float32, LAYERS[:2])
    with pytest.raises(ValueError, match="weights and base must share a device and a dtype"):
        sync_rows([weights[0], weights[1].float()], *rest)
