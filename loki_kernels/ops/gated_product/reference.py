from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def gated_product_reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh") * up


def example(
    device: torch.device | str, dtype: torch.dtype
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Keyword arguments of a small case, and which of them are differentiable."""
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 33, 129, generator=generator).to(device, dtype)
    return {"gate": gate, "up": up}, ("gate", "up")
