from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loki_kernels import ops
from loki_kernels.ops import _products
from loki_kernels.ops._products import padded_rows, selected_columns

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "k"), [(1, 1, 1), (63, 129, 20), (5, 16, 8), (129, 500, 499)]
)
def test_selected_columns_are_those_and_a_multiple_of_16(tokens, width, k, dtype):
    torch.manual_seed(tokens)
    x, index = torch.randn(tokens, width).to(dtype), torch.randperm(width)[:k]
    for order in (index, index.sort().values):
        got = selected_columns(x, order)
        assert torch.equal(got[:, :k], x[:, order])
        assert got.is_contiguous()
        assert got.shape[1] == k + -k % 16
        assert got.data_ptr() % 16 == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (20, 5), (16, 2), (2, 17, 4), (0, 3)])
def test_padded_rows_are_zeros(shape, dtype):
    update = torch.randn(*shape)
    got, k = padded_rows(update, dtype), shape[-2]
    assert got.dtype == dtype
    assert got.shape == (*shape[:-2], k + -k % 16, shape[-1])
    assert torch.equal(got[..., :k, :], update.to(dtype))
    assert not got[..., k:, :].any()


@pytest.mark.parametrize(("tokens", "k"), [(0, 3), (4, 0)])
def test_nothing_to_select(tokens, k):
    got = selected_columns(torch.zeros(tokens, 9), torch.arange(k))
    assert got.shape == (tokens, k + -k % 16)


def test_selected_columns_of_what_is_not_contiguous():
    x, index = torch.randn(3, 129, 63).mT[:, ::2], torch.randperm(129).repeat_interleave(2)[::2]
    k = len(index)
    assert torch.equal(selected_columns(x, index)[:, :k], x.reshape(-1, 129)[:, index])
    expanded = torch.randn(1, 1).expand(7, 129)
    assert torch.equal(selected_columns(expanded, index)[:, :k], expanded[:, :1].expand(7, k))


def test_selected_columns_of_tensors_without_numbers():
    x, index = torch.zeros(2, 3, 9), torch.arange(5)
    assert selected_columns(x.to("meta"), index.to("meta")).shape == (6, 16)
    with FakeTensorMode() as mode:
        assert selected_columns(mode.from_tensor(x), mode.from_tensor(index)).shape == (6, 16)


def test_float16_that_sums_in_float16_has_no_float32_product(monkeypatch):
    """cuBLAS refuses it, so the gradient is rounded as the settings have it."""
    assert _products._sums_in_float32(torch.float16)
    settings = SimpleNamespace(allow_fp16_accumulation=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    assert not _products._sums_in_float32(torch.float16)
    assert _products._sums_in_float32(torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "hip", "dtype", "wide"),
    [
        ((7, 5), None, torch.bfloat16, False),
        ((8, 0), None, torch.bfloat16, True),
        ((7, 5), None, torch.float16, True),
        ((7, 5), "7.0", torch.bfloat16, True),
    ],
)
def test_bfloat16_has_a_float32_product_from_ampere_on(capability, hip, dtype, wide, monkeypatch):
    """cuBLAS refuses it on a T4, where both factors are made float32 then."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    _products._capability.cache_clear()
    asked = []

    def mm(a, b, *, out_dtype):
        asked.append(out_dtype)
        return a.float() @ b.float()

    monkeypatch.setattr(torch, "mm", mm)
    with FakeTensorMode():
        selected, x = (torch.empty(7, n, dtype=dtype, device="cuda") for n in (16, 5))
        got = _products.weight_gradient(selected, x, torch.float32)
    assert got.shape == (16, 5)
    assert got.dtype == torch.float32
    assert asked == ([torch.float32] if wide else [])
    _products._capability.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_pass_inside_autocast_rounds_no_gradient(dtype):
    selected, x = torch.randn(63, 16).to(dtype), torch.randn(63, 129).to(dtype)
    want = _products.weight_gradient(selected, x, torch.float32)
    with torch.autocast(x.device.type, torch.bfloat16):
        got = _products.weight_gradient(selected, x, torch.float32)
    assert torch.equal(got, want)


def test_selected_columns_compile_whole():
    torch._dynamo.reset()
    x, index = torch.randn(7, 129), torch.randperm(129)[:37]
    compiled = torch.compile(selected_columns, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, index)[:, :37], x[:, index])


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_model_may_add_to_a_result_in_place(with_bias):
    """Falcon's layers do, and Llama 4's mixture."""
    bias = torch.zeros(8) if with_bias else None
    x, rows, index = torch.ones(2, 5, 6), torch.zeros(3, 6, requires_grad=True), torch.arange(3)
    weight = torch.ones(8, 6)
    for y in (
        ops.row_delta_linear(x, weight, rows, None, index, bias),
        ops.row_masked_linear(x, weight, rows, index, bias),
        ops.swiglu_row_masked_linear(x, x, weight, rows, index, bias),
    ):
        y += 1
        y.sum().backward()
    assert rows.grad.all()
