from __future__ import annotations

import torch
from torch import Tensor

from .._example import Draw, Example


def sync_rows_reference(
    weights: list[Tensor], base: list[Tensor], updates: list[Tensor], indices: list[Tensor]
) -> list[Tensor]:
    for weight, own, update, index in zip(weights, base, updates, indices, strict=True):
        wide = torch.promote_types(torch.promote_types(own.dtype, update.dtype), torch.float32)
        weight[index] = (own.to(wide) + update.to(wide)).to(weight.dtype)
    return weights


def example(draw: Draw) -> Example:
    inputs = {
        "weights": [draw.normal(9, 33), draw.normal(12, 64)],
        "base": [draw.normal(4, 33), draw.normal(5, 64)],
        "updates": [draw.normal(k, n, dtype=torch.float32) for k, n in ((4, 33), (5, 64))],
        "indices": [draw.index(4, 9), draw.index(5, 12)],
    }
    return inputs, ()
