from __future__ import annotations

from torch import Tensor

from .._products import padded_rows


def forward(y: Tensor, index: Tensor, u: Tensor, v: Tensor) -> None:
    y.index_add_(1, index, (u @ padded_rows(v, v.dtype).t())[:, : len(index)])
