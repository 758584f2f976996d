from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import library as torch_library

from loki_kernels.ops import integrate_path
from loki_kernels.ops.integrate_path.reference import integrate_path_reference
from tests.ops.tolerance import example, relative

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SPANS = ["sum", "z", "z_shared", "z_each"]
SIZES = [(1, 1, 1), (3, 5, 63), (2, 20, 129), (2, 63, 500)]


def naive(gradients, weights, z=None, baseline=None):
    """Point by point, in the gradients' own dtype."""
    batch, m, width = gradients.shape
    out = torch.zeros(batch, width, dtype=gradients.dtype)
    for b in range(batch):
        factors = weights[b] if weights.ndim == 2 else weights
        for k in range(m):
            out[b] = out[b] + factors[k].item() * gradients[b, k]
        if z is not None:
            start = 0 if baseline is None else baseline[b] if baseline.ndim == 2 else baseline
            out[b] = out[b] * (z[b] - start)
    return out


def double(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def make(batch, m, width, span, dtype, per_sample=False):
    torch.manual_seed(batch + m + width)
    gradients = torch.randn(batch, m, width).to(dtype)
    weights = torch.rand(*([batch, m] if per_sample else [m])) + 0.1
    z = None if span == "sum" else torch.randn(batch, width).to(dtype)
    baseline = {
        "z_shared": torch.randn(width).to(dtype),
        "z_each": torch.randn(batch, width).to(dtype),
    }.get(span)
    return gradients, weights, z, baseline


@pytest.mark.parametrize("op", [integrate_path, integrate_path_reference])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("batch", "m", "width"), SIZES)
def test_equals_naive(op, dtype, span, per_sample, batch, m, width):
    inputs = make(batch, m, width, span, dtype, per_sample)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = naive(*double(*inputs))
    same = naive(*[None if x is None else x.to(wide) for x in inputs])
    got = op(*inputs)
    assert got.shape == exact.shape
    assert got.dtype == wide
    floor = 1e-12 if wide == torch.float64 else 1e-6
    assert relative(got, exact) < 2 * relative(same, exact) + floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_summed_in_float32(dtype):
    """4096 plus 256 halves: a bfloat16 or float16 running sum loses every half."""
    gradients = torch.cat([torch.full((1, 1, 3), 4096.0), torch.full((1, 256, 3), 0.5)], 1)
    got = integrate_path(gradients.to(dtype), torch.ones(257))
    assert got.tolist() == [[4224.0] * 3]


def test_z_of_another_dtype():
    gradients, weights, z, baseline = make(2, 5, 63, "z_each", torch.float32)
    z, baseline = z.bfloat16(), baseline.double()
    got = integrate_path(gradients, weights, z, baseline)
    assert got.dtype == torch.float32
    assert relative(got, naive(*double(gradients, weights, z, baseline))) < 1e-6


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("span", SPANS)
def test_non_contiguous(span, per_sample):
    gradients, weights, z, baseline = make(4, 10, 126, span, torch.float32, per_sample)
    gradients = gradients.permute(2, 0, 1).contiguous().permute(1, 2, 0)[:, ::2, ::2]
    weights = weights[..., ::2]
    z, baseline = (None if x is None else x[..., ::2] for x in (z, baseline))
    assert not gradients.is_contiguous()
    got = integrate_path(gradients, weights, z, baseline)
    assert relative(got, naive(*double(gradients, weights, z, baseline))) < 1e-6


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("span", SPANS)
def test_points_first_in_memory(span, per_sample):
    """Read where they are: the nodes are side by side, samples and points are not."""
    gradients, weights, z, baseline = make(4, 10, 140, span, torch.float32, per_sample)
    gradients = gradients.transpose(0, 1).contiguous().transpose(0, 1)[..., 3:132]
    z, baseline = (None if x is None else x[..., 5:134] for x in (z, baseline))
    assert not gradients.is_contiguous()
    got = integrate_path(gradients, weights, z, baseline)
    assert relative(got, naive(*double(gradients, weights, z, baseline))) < 1e-6


def test_points_beyond_int32():
    """The third point starts beyond 2**31 elements, of which few are touched."""
    step = 2**30 + 16
    memory = torch.from_numpy(np.zeros(2 * step + 63, np.float16))  # from calloc: not in RAM
    gradients = memory.to(torch.get_default_device()).as_strided((1, 3, 63), (0, step, 1))
    gradients.copy_(torch.randn(1, 3, 63))
    weights = torch.tensor([1.0, 2.0, 3.0])
    got = integrate_path(gradients, weights)
    assert relative(got, naive(*double(gradients, weights))) < 1e-6


@pytest.mark.parametrize("span", SPANS)
def test_no_points_sum_to_zero(span):
    gradients, weights, z, baseline = make(2, 0, 5, span, torch.bfloat16)
    got = integrate_path(gradients, weights, z, baseline)
    assert torch.equal(got, torch.zeros(2, 5))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("batch", "width"), [(0, 5), (2, 0)])
def test_empty(batch, width, span, per_sample):
    assert integrate_path(*make(batch, 3, width, span, torch.float32, per_sample)).shape == (
        batch,
        width,
    )


def test_inputs_are_left_alone():
    inputs = make(2, 5, 63, "z_each", torch.float32)
    before = [x.clone() for x in inputs]
    integrate_path(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("gradients", "weights"),
    [
        ((2, 3, 5), (4,)),
        ((2, 3, 5), (2,)),
        ((2, 3, 5), (2, 5)),
        ((2, 3, 5), (1, 2, 3)),
        ((3, 5), (3,)),
        ((1, 2, 3, 5), (3,)),
        ((2, 3, 5), ()),
        ((1, 3, 5), (4, 3)),
        ((2, 3, 5), (4, 3)),
    ],
)
def test_weights_that_do_not_fit_raise(gradients, weights):
    with pytest.raises(ValueError, match="weights"):
        integrate_path(torch.zeros(gradients), torch.zeros(weights))


def test_registration():
    inputs = example("integrate_path")
    torch_library.opcheck(torch.ops.loki_kernels.integrate_path.default, (*inputs.values(), None))


def test_compiles_whole():
    torch._dynamo.reset()
    inputs = example("integrate_path")
    compiled = torch.compile(integrate_path, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), integrate_path(**inputs))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 6), (2, 1, 5)])
def test_a_z_that_does_not_fit_raises(shape):
    with pytest.raises(ValueError, match="z must be"):
        integrate_path(torch.zeros(2, 3, 5), torch.zeros(3), torch.zeros(shape))


def test_a_baseline_that_does_not_fit_raises():
    with pytest.raises(ValueError, match="baseline must be"):
        integrate_path(torch.zeros(2, 3, 5), torch.zeros(3), torch.zeros(2, 5), torch.zeros(6))
