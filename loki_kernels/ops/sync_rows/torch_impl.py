from __future__ import annotations

from torch import Tensor


def forward(weights: list[Tensor], rows: list[Tensor], indices: list[Tensor]) -> None:
    for weight, layer_rows, index in zip(weights, rows, indices, strict=True):
        weight.index_copy_(0, index, layer_rows.to(weight.dtype))
