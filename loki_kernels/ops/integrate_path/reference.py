from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def integrate_path_reference(
    gradients: Tensor,
    weights: Tensor,
    z: Tensor | None = None,
    baseline: Tensor | None = None,
) -> Tensor:
    wide = torch.float64 if gradients.dtype == torch.float64 else torch.float32
    weights = weights.to(device=gradients.device, dtype=wide)
    if weights.ndim == 1:
        weights = weights.expand(gradients.shape[0], -1)
    total = (weights.unsqueeze(-1) * gradients.to(wide)).sum(1)
    if z is None:
        return total
    span = z.to(wide)
    if baseline is not None:
        span = span - baseline.to(device=z.device, dtype=wide)
    return total * span


def example(
    device: torch.device | str, dtype: torch.dtype
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Keyword arguments of a small case, and which of them are differentiable."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    inputs = {
        "gradients": normal(3, 7, 129),
        "weights": torch.rand(3, 7, generator=generator),
        "z": normal(3, 129),
        "baseline": normal(129),
    }
    return inputs, ()
