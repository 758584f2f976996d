from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gather_columns_reference(x: Tensor, index: Tensor) -> Tensor:
    return x[:, index]


def example(
    device: torch.device | str, dtype: torch.dtype
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Keyword arguments of a small case, and which of them are differentiable."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(65, 129, generator=generator).to(device, dtype)
    index = torch.randperm(129, generator=generator)[:37].to(device)
    return {"x": x, "index": index}, ()
