from __future__ import annotations

import pytest
import torch

from loki_kernels.attribution.definitions import path_rule
from loki_kernels.attribution.path import path_points
from tests.ops.tolerance import relative

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BASELINES = ["none", "shared", "each"]


def naive(z, alphas, baseline=None):
    """One point at a time, in z's dtype."""
    batch, width = z.shape
    out = torch.empty(batch, len(alphas), width, dtype=z.dtype)
    for b in range(batch):
        start = torch.zeros_like(z[b]) if baseline is None else baseline
        start = start[b] if start.ndim == 2 else start
        for k, alpha in enumerate(alphas.tolist()):
            out[b, k] = start + alpha * (z[b] - start)
    return out


def assert_close(got, same, exact):
    """No further from the float64 answer than twice what the naive code in that dtype is."""
    assert got.shape == exact.shape
    assert got.is_contiguous()
    assert got.dtype == same.dtype
    floor = 1e-12 if got.dtype == torch.float64 else 1e-6
    assert relative(got, exact) < 2 * relative(same, exact) + floor


def double(tensor):
    return None if tensor is None else tensor.double()


def make(batch, width, m, kind, dtype):
    torch.manual_seed(batch + width + m)
    z = torch.randn(batch, width).to(dtype)
    alphas = torch.rand(m, dtype=torch.float64)
    baseline = {
        "none": None,
        "shared": torch.randn(width).to(dtype),
        "each": torch.randn(batch, width).to(dtype),
    }[kind]
    return z, alphas, baseline


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize(
    ("batch", "width", "m"), [(1, 1, 1), (3, 63, 5), (2, 129, 20), (2, 500, 7)]
)
def test_equals_naive(dtype, kind, batch, width, m):
    z, alphas, baseline = make(batch, width, m, kind, dtype)
    exact = naive(z.double(), alphas, double(baseline))
    assert_close(path_points(z, alphas, baseline), naive(z, alphas, baseline), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BASELINES)
def test_low_precision_is_rounded_once(dtype, kind):
    """Computed in float32: nothing but the last rounding is lost."""
    z, alphas, baseline = make(4, 129, 9, kind, dtype)
    exact = naive(z.double(), alphas, double(baseline))
    rounded = exact.to(dtype)
    assert relative(path_points(z, alphas, baseline), exact) < 1.01 * relative(rounded, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_are_exact(dtype):
    z = torch.randn(3, 63).to(dtype)
    points = path_points(z, torch.tensor([0.0, 1.0]))
    assert torch.equal(points[:, 0], torch.zeros_like(z))
    assert torch.equal(points[:, 1], z)


def test_baseline_is_the_start():
    z, start = torch.randn(3, 63), torch.randn(63)
    points = path_points(z, torch.tensor([0.0]), start)
    assert torch.equal(points[:, 0], start.expand(3, -1))


def test_baseline_of_another_dtype():
    z, alphas, baseline = make(2, 63, 4, "each", torch.float64)
    got = path_points(z.bfloat16(), alphas, baseline)
    exact = naive(z.bfloat16().double(), alphas, baseline)
    assert got.dtype == torch.bfloat16
    assert relative(got, exact) < 2 * relative(exact.bfloat16(), exact)


@pytest.mark.parametrize("kind", BASELINES)
def test_non_contiguous(kind):
    z, alphas, baseline = make(4, 126, 10, kind, torch.float32)
    z, alphas = z.t().contiguous().t()[:, ::2], alphas[::2]
    baseline = None if baseline is None else baseline[..., ::2]
    assert not z.is_contiguous()
    exact = naive(z.double(), alphas, double(baseline))
    assert_close(path_points(z, alphas, baseline), naive(z, alphas, baseline), exact)


@pytest.mark.parametrize(("batch", "width", "m"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
@pytest.mark.parametrize("kind", BASELINES)
def test_empty(batch, width, m, kind):
    z, alphas, baseline = make(batch, width, m, kind, torch.bfloat16)
    points = path_points(z, alphas, baseline)
    assert points.shape == (batch, m, width)
    assert points.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rule", "alphas", "weights"),
    [
        ("left", [0, 1 / 3, 2 / 3], [1 / 3] * 3),
        ("right", [1 / 3, 2 / 3, 1], [1 / 3] * 3),
        ("midpoint", [1 / 6, 1 / 2, 5 / 6], [1 / 3] * 3),
        ("trapezoid", [0, 1 / 2, 1], [1 / 4, 1 / 2, 1 / 4]),
        ("captum_trapezoid", [0, 1 / 2, 1], [1 / 6, 1 / 3, 1 / 6]),
        (
            "gauss-legendre",
            [(1 - 0.6**0.5) / 2, 1 / 2, (1 + 0.6**0.5) / 2],
            [5 / 18, 4 / 9, 5 / 18],
        ),
    ],
)
def test_the_rules_of_three_points(rule, alphas, weights):
    got = path_rule(rule, 3)
    for found, want in zip(got, (alphas, weights), strict=True):
        torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64))
