from __future__ import annotations

import torch
from torch import Tensor


def forward(
    weights: list[Tensor], base: list[Tensor], updates: list[Tensor], indices: list[Tensor]
) -> None:
    for weight, own, update, index in zip(weights, base, updates, indices, strict=True):
        wide = torch.promote_types(torch.promote_types(own.dtype, update.dtype), torch.float32)
        weight.index_copy_(0, index, (own.to(wide) + update).to(weight.dtype))
