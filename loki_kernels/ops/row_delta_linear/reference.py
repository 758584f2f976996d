from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def row_delta_linear_reference(
    x: Tensor,
    weight: Tensor,
    delta_a: Tensor,
    delta_b: Tensor | None,
    index: Tensor,
    bias: Tensor | None = None,
    directions: Tensor | None = None,
) -> Tensor:
    update = delta_a if delta_b is None else delta_a @ delta_b
    if directions is not None:
        update = update - update @ directions @ directions.T
    delta = torch.zeros_like(weight).index_copy(0, index, update.to(weight.dtype))
    return functional.linear(x, weight + delta, bias)
