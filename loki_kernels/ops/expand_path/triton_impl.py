"""One program a sample and block of nodes: z is read once for all points."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._check import unit_stride, unsupported_dtype
from .._triton import DTYPES, Compilation, narrow

_CONFIG = triton.Config({"BLOCK": 1024}, num_warps=4, num_stages=1)


def unsupported(z: Tensor, _alphas: Tensor, baseline: Tensor | None) -> str | None:
    return unsupported_dtype(z, baseline)


@triton.jit
def forward_kernel(
    z, alphas, baseline, out, z_row, baseline_row, points, width,
    BASELINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = node < width
    span = tl.load(z + sample * z_row + node, mask=mask, other=0.0).to(tl.float32)
    start = tl.zeros((BLOCK,), tl.float32)
    if BASELINE:
        start = tl.load(baseline + sample * baseline_row + node, mask=mask, other=0.0)
        start = start.to(tl.float32)
        span -= start
    for k in range(points):
        value = start + tl.load(alphas + k) * span
        place = out + (sample * points + k) * width + node
        tl.store(place, narrow(value, out.dtype.element_ty), mask=mask)


def forward(z: Tensor, alphas: Tensor, baseline: Tensor | None) -> Tensor:
    samples, width = z.shape
    out = torch.empty(samples, len(alphas), width, dtype=z.dtype, device=z.device)
    if not out.numel():
        return out
    z = unit_stride(z)
    start = z if baseline is None else unit_stride(baseline.to(z.device).expand(samples, width))
    grid = (samples, triton.cdiv(width, _CONFIG.kwargs["BLOCK"]))
    with torch.cuda.device_of(z):
        forward_kernel[grid](
            z,
            # waiting for so few numbers would be waiting for the device, at every layer
            alphas.to(device=z.device, dtype=torch.float32, non_blocking=True).contiguous(),
            start,
            out,
            z.stride(0),
            start.stride(0),
            len(alphas),
            width,
            BASELINE=baseline is not None,
            **_CONFIG.all_kwargs(),
        )
    return out


def compilations() -> Iterator[Compilation]:
    for name in DTYPES.values():
        types = dict.fromkeys(("z", "baseline", "out"), f"*{name}") | {"alphas": "*fp32"}
        types |= dict.fromkeys(("z_row", "baseline_row", "points", "width"), "i32")
        for baseline in (False, True):
            yield Compilation(forward_kernel, types, {"BASELINE": baseline}, (_CONFIG,), name)
