from __future__ import annotations

import torch
from torch import Tensor

from .._example import Draw, Example
from ..count_lowest.reference import count_lowest_reference
from ..integrate_path.reference import integrate_path_reference


def count_lowest_integrated_reference(
    gradients: Tensor,
    weights: Tensor,
    z: Tensor | None,
    baseline: Tensor | None,
    k: int,
    counts: Tensor | None = None,
    *,
    criterion: str = "signed",
) -> tuple[Tensor, Tensor]:
    scores = integrate_path_reference(gradients, weights, z, baseline)
    ranked = scores[~scores.isnan().any(-1)].unsqueeze(1)
    counts = counts.unsqueeze(0) if counts is not None else None
    counts = count_lowest_reference(ranked, k, counts, criterion=criterion)
    return counts[0], scores.sum(-1, dtype=torch.float64)


def example(draw: Draw) -> Example:
    """Whole numbers and powers of two, so that every dtype has the same exact scores, many of them
    equal: a rank decided by rounding would be no mistake."""
    inputs = {
        "gradients": draw.normal(3, 7, 129).round(),
        "weights": 2.0 ** draw.normal(3, 7, dtype=torch.float32).round(),
        "z": draw.normal(3, 129).round(),
        "baseline": draw.normal(129).round(),
        "k": 40,
    }
    return inputs, ()
