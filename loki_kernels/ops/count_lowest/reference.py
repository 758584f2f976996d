from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def count_lowest_reference(
    scores: Tensor, k: int, counts: Tensor | None = None, *, criterion: str = "signed"
) -> Tensor:
    values = scores.abs() if criterion == "magnitude" else scores
    lowest = values.argsort(dim=-1, stable=True)[..., :k]
    if counts is None:
        counts = torch.zeros(scores.shape[1:], dtype=torch.int64, device=scores.device)
    for sample in lowest:
        for layer, nodes in enumerate(sample):
            counts[layer, nodes] += 1
    return counts


def example(
    device: torch.device | str, dtype: torch.dtype
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Keyword arguments of a small case, and which of them are differentiable."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 3, 129, generator=generator).to(device, dtype)
    return {"scores": scores, "k": 40}, ()
