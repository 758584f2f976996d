from __future__ import annotations

from torch import Tensor

from .._products import rounded_sum


def forward(
    weights: list[Tensor], base: list[Tensor], updates: list[Tensor], indices: list[Tensor]
) -> None:
    for weight, own, update, index in zip(weights, base, updates, indices, strict=True):
        weight.index_copy_(0, index, rounded_sum(own, update, weight.dtype))
