from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..count_lowest import torch_impl as count_lowest
from ..integrate_path import torch_impl as integrate_path


def forward(
    gradients: Tensor,
    weights: Tensor,
    z: Tensor | None,
    baseline: Tensor | None,
    k: int,
    counts: Tensor,
    magnitude: bool,
) -> Tensor:
    return in_two_steps(
        integrate_path, count_lowest, gradients, weights, z, baseline, k, counts, magnitude
    )


def in_two_steps(
    integrate: ModuleType,
    count: ModuleType,
    gradients: Tensor,
    weights: Tensor,
    z: Tensor | None,
    baseline: Tensor | None,
    k: int,
    counts: Tensor,
    magnitude: bool,
) -> Tensor:
    """With the scores of one layer in between, which the next layer's replace."""
    scores = integrate.forward(gradients, weights, z, baseline)
    ranked = scores[~scores.isnan().any(-1)].unsqueeze(1)
    if k > 0 and ranked.numel():
        count.forward(ranked, k, counts.unsqueeze(0), magnitude)
    return scores.sum(-1, dtype=torch.float64)
