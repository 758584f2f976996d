from __future__ import annotations

import torch
from torch import Tensor

from .._example import Draw, Example


def sync_rows_reference(
    weights: list[Tensor], rows: list[Tensor], indices: list[Tensor]
) -> list[Tensor]:
    for weight, layer_rows, index in zip(weights, rows, indices, strict=True):
        weight[index] = layer_rows.to(weight.dtype)
    return weights


def example(draw: Draw) -> Example:
    inputs = {
        "weights": [draw.normal(9, 33), draw.normal(12, 64)],
        "rows": [draw.normal(k, n, dtype=torch.float32) for k, n in ((4, 33), (5, 64))],
        "indices": [draw.index(4, 9), draw.index(5, 12)],
    }
    return inputs, ()
