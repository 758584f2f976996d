from __future__ import annotations

import torch
from torch import Tensor

from .._example import Draw, Example


def sync_rows_reference(
    weights: list[Tensor], rows: list[Tensor], indices: list[Tensor], *, seed: int | None = None
) -> list[Tensor]:
    for layer, (weight, layer_rows, index) in enumerate(zip(weights, rows, indices, strict=True)):
        weight[index] = (
            layer_rows.to(weight.dtype) if seed is None else rounded(layer_rows, layer, seed)
        )
    return weights


def rounded(rows: Tensor, layer: int, seed: int) -> Tensor:
    """float32 as bfloat16: 16 bits that seed, layer, row and column decide are added below the
    bits that stay, and carry over as often as they should."""
    row = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
    column = torch.arange(rows.shape[1], device=rows.device)
    stream = _mix(_mix(seed ^ _mix(torch.full_like(row, layer))) + row)
    noise = _mix(stream + column) & 0xFFFF
    bits = rows.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    up = (bits + noise) & 0xFFFF0000
    up = torch.where(up >= 1 << 31, up - (1 << 32), up).to(torch.int32).view(torch.float32)
    return torch.where(rows.isfinite(), up, rows).to(torch.bfloat16)


def _mix(x: Tensor) -> Tensor:
    """A hash of 32-bit integers (C. Wellons' "lowbias32"), here in 64 bits."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def example(draw: Draw) -> Example:
    inputs = {
        "weights": [draw.normal(9, 33), draw.normal(12, 64)],
        "rows": [draw.normal(k, n, dtype=torch.float32) for k, n in ((4, 33), (5, 64))],
        "indices": [draw.index(4, 9), draw.index(5, 12)],
    }
    return inputs, ()
