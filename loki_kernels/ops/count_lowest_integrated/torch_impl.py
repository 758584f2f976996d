from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ..count_lowest import torch_impl as count_lowest
from ..integrate_path import torch_impl as integrate_path


def in_two_steps(integrate: ModuleType, count: ModuleType) -> Callable[..., Tensor]:
    """A ``forward`` with the scores of one layer in between, which the next layer's replace."""

    def forward(
        gradients: Tensor,
        weights: Tensor,
        z: Tensor | None,
        baseline: Tensor | None,
        k: int,
        counts: Tensor,
        magnitude: bool,
    ) -> Tensor:
        scores = integrate.forward(gradients, weights, z, baseline)
        ranked = scores[~scores.isnan().any(-1)].unsqueeze(1)
        if k > 0 and ranked.numel():
            count.forward(ranked, k, counts.unsqueeze(0), magnitude)
        return scores.sum(-1, dtype=torch.float64)

    return forward


forward = in_two_steps(integrate_path, count_lowest)
