"""``csrc/count_lowest_integrated.cu``: one block a sample; no score is written."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from .._check import unit_stride, unsupported_dtype
from ..count_lowest.cuda_impl import unsupported_width

_count_lowest_integrated = _native.define(
    "cuda",
    "count_lowest_integrated(Tensor gradients, Tensor weights, Tensor? z, Tensor? baseline, int k, "
    "Tensor(a!) counts, bool magnitude, Tensor(b!) sums) -> ()",
)


def unsupported(
    gradients: Tensor, _weights: Tensor, z: Tensor | None, baseline: Tensor | None, *_: object
) -> str | None:
    if any(x is not None and x.dtype != gradients.dtype for x in (z, baseline)):
        return "its kernel takes z and the baseline in the gradients' dtype."
    return unsupported_dtype(gradients) or unsupported_width(gradients)


def forward(
    gradients: Tensor,
    weights: Tensor,
    z: Tensor | None,
    baseline: Tensor | None,
    k: int,
    counts: Tensor,
    magnitude: bool,
) -> Tensor:
    samples, points, width = gradients.shape
    sums = torch.zeros(samples, dtype=torch.float64, device=gradients.device)
    if samples == 0 or width == 0:
        return sums
    weights = weights.to(gradients.device, torch.float32).contiguous().expand(samples, points)
    if z is not None:
        z = unit_stride(z.to(gradients.device))
        if baseline is not None:
            baseline = unit_stride(baseline.to(gradients.device).expand(samples, width))
    start = None if z is None else baseline
    _count_lowest_integrated(unit_stride(gradients), weights, z, start, k, counts, magnitude, sums)
    return sums
