from __future__ import annotations

import torch
from torch import Tensor

from .._example import Draw, Example


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
    if z is not None:
        span = z.to(wide)
        if baseline is not None:
            span = span - baseline.to(device=z.device, dtype=wide)
        total = total * span
    return total.contiguous()


def example(draw: Draw) -> Example:
    inputs = {
        "gradients": draw.normal(3, 7, 129),
        "weights": draw.normal(3, 7, dtype=torch.float32),
        "z": draw.normal(3, 129),
        "baseline": draw.normal(129),
    }
    return inputs, ()
