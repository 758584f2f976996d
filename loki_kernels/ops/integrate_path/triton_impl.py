"""One program a sample and block of nodes sums over the points in registers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._check import unit_stride, unsupported_dtype
from .._triton import DTYPES, Compilation

_CONFIG = triton.Config({"BLOCK": 1024}, num_warps=4, num_stages=1)


def unsupported(
    gradients: Tensor, _weights: Tensor, z: Tensor | None, baseline: Tensor | None
) -> str | None:
    return unsupported_dtype(gradients, z, baseline)


@triton.jit
def forward_kernel(
    gradients, weights, z, baseline, out,
    gradients_sample, gradients_point, weights_sample, z_sample, baseline_sample, points, width,
    SPAN: tl.constexpr, BASELINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = node < width
    gradients += sample * gradients_sample
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(points):
        weight = tl.load(weights + sample * weights_sample + k)
        gradient = tl.load(gradients + node, mask=mask, other=0.0)
        total += weight * gradient.to(tl.float32)
        gradients += gradients_point  # k times the stride may leave int32
    if SPAN:
        span = tl.load(z + sample * z_sample + node, mask=mask, other=0.0).to(tl.float32)
        if BASELINE:
            start = tl.load(baseline + sample * baseline_sample + node, mask=mask, other=0.0)
            span -= start.to(tl.float32)
        total *= span
    tl.store(out + sample * width + node, total, mask=mask)


def forward(
    gradients: Tensor, weights: Tensor, z: Tensor | None, baseline: Tensor | None
) -> Tensor:
    samples, points, width = gradients.shape
    device = gradients.device
    out = torch.empty(samples, width, dtype=torch.float32, device=device)
    if not out.numel():
        return out
    gradients = unit_stride(gradients)
    weights = weights.to(device=device, dtype=torch.float32).contiguous().expand(samples, points)
    if z is None:
        end = start = out
    else:
        end = unit_stride(z.to(device))
        start = end
        if baseline is not None:
            start = unit_stride(baseline.to(device).expand(samples, width))
    grid = (samples, triton.cdiv(width, _CONFIG.kwargs["BLOCK"]))
    with torch.cuda.device_of(gradients):
        forward_kernel[grid](
            gradients,
            weights,
            end,
            start,
            out,
            *gradients.stride()[:2],
            weights.stride(0),
            end.stride(0),
            start.stride(0),
            points,
            width,
            SPAN=z is not None,
            BASELINE=baseline is not None,
            **_CONFIG.all_kwargs(),
        )
    return out


def compilations() -> Iterator[Compilation]:
    for name in DTYPES.values():
        types = dict.fromkeys(("gradients", "z", "baseline"), f"*{name}")
        types |= {"weights": "*fp32", "out": "*fp32"}
        strides = (
            "gradients_sample",
            "gradients_point",
            "weights_sample",
            "z_sample",
            "baseline_sample",
        )
        types |= dict.fromkeys((*strides, "points", "width"), "i32")
        for flags in ((False, False), (True, False), (True, True)):
            constants = dict(zip(("SPAN", "BASELINE"), flags, strict=True))
            yield Compilation(forward_kernel, types, constants, (_CONFIG,), name)
