from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def row_masked_linear_reference(
    x: Tensor, weight: Tensor, rows: Tensor, index: Tensor, bias: Tensor | None = None
) -> Tensor:
    return functional.linear(x, weight.index_copy(0, index, rows.to(weight.dtype)), bias)
