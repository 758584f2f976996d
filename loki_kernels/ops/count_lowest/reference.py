from __future__ import annotations

import torch
from torch import Tensor

from .._example import Draw, Example


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


def example(draw: Draw) -> Example:
    return {"scores": draw.normal(5, 3, 129), "k": 40}, ()
