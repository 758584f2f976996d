from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..count_lowest import torch_impl as count_lowest
from ..integrate_path import torch_impl as integrate_path


def in_two_steps(
    integrate: Callable[..., Tensor], count: Callable[..., None]
) -> Callable[..., Tensor]:
    """A ``forward`` with the scores of one layer in between, which the next layer's replace.

    ``count`` is a `count_lowest` that takes nothing of a sample with a NaN.
    """

    def forward(
        gradients: Tensor,
        weights: Tensor,
        z: Tensor | None,
        baseline: Tensor | None,
        k: int,
        counts: Tensor,
        magnitude: bool,
    ) -> Tensor:
        scores = integrate(gradients, weights, z, baseline)
        if k > 0:
            count(scores.unsqueeze(1), k, counts.unsqueeze(0), magnitude)
        return scores.sum(-1, dtype=torch.float64)

    return forward


def passing_over_nan(count: Callable[..., None]) -> Callable[..., None]:
    """``count`` of the samples of one layer without a NaN; finding them waits for the device."""

    def forward(scores: Tensor, k: int, counts: Tensor, magnitude: bool) -> None:
        ranked = scores[~scores.isnan().any(-1)].unsqueeze(1)
        if ranked.numel():
            count(ranked, k, counts, magnitude)

    return forward


forward = in_two_steps(integrate_path.forward, passing_over_nan(count_lowest.forward))
