from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def row_delta_linear_reference(
    x: Tensor,
    weight: Tensor,
    delta_a: Tensor,
    delta_b: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    delta = torch.zeros_like(weight).index_copy(0, index, (delta_a @ delta_b).to(weight.dtype))
    return functional.linear(x, weight + delta, bias)
