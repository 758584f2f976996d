from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scatter_add_columns_reference(y: Tensor, index: Tensor, u: Tensor, v: Tensor) -> Tensor:
    y[:, index] += u @ v.t()
    return y


def example(
    device: torch.device | str, dtype: torch.dtype
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Keyword arguments of a small case, and which of them are differentiable."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    index = torch.randperm(129, generator=generator)[:37].to(device)
    return {"y": normal(65, 129), "index": index, "u": normal(65, 40), "v": normal(37, 40)}, ()
