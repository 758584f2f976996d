"""What the ops' self-checks are fed: small cases, the same numbers on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Keyword arguments of an op, and which of them are differentiable.
Example = tuple[dict[str, Any], tuple[str, ...]]


class Draw:
    """Random tensors drawn on the CPU, then brought to ``device`` and ``dtype``."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def index(self, k: int, size: int) -> Tensor:
        """int64 ``[k]`` in [0, size), distinct and in no order."""
        return torch.randperm(size, generator=self.generator)[:k].to(self.device)
