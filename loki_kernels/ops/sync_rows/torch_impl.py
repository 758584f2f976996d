from __future__ import annotations

from torch import Tensor

from .reference import rounded


def forward(
    weights: list[Tensor], rows: list[Tensor], indices: list[Tensor], seed: int | None
) -> None:
    for layer, (weight, layer_rows, index) in enumerate(zip(weights, rows, indices, strict=True)):
        if seed is None:
            layer_rows = layer_rows.to(weight.dtype)
        else:
            layer_rows = rounded(layer_rows, layer, seed)
        weight.index_copy_(0, index, layer_rows)
