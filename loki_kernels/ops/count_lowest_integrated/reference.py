from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


def example(
    device: torch.device | str, dtype: torch.dtype
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Keyword arguments of a small case, and which of them are differentiable.

    Small whole numbers and powers of two, so that every dtype has the same exact scores, many of
    them equal: a rank decided by rounding would be no mistake.
    """
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).to(device, dtype)

    inputs = {
        "gradients": whole(3, 7, 129),
        "weights": 2.0 ** torch.randint(-2, 2, (3, 7), generator=generator),
        "z": whole(3, 129),
        "baseline": whole(129),
        "k": 40,
    }
    return inputs, ()
