"""Triton's `integrate_path`, then its `count_lowest`, which passes over a sample with a NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import unsupported_dtype
from ..count_lowest import triton_impl as count_lowest
from ..integrate_path import triton_impl as integrate_path


def unsupported(
    gradients: Tensor, _weights: Tensor, z: Tensor | None, baseline: Tensor | None, *_: object
) -> str | None:
    return unsupported_dtype(gradients, z, baseline) or count_lowest.unsupported(gradients)


def forward(
    gradients: Tensor,
    weights: Tensor,
    z: Tensor | None,
    baseline: Tensor | None,
    k: int,
    counts: Tensor,
    magnitude: bool,
) -> Tensor:
    scores = integrate_path.forward(gradients, weights, z, baseline)
    if k > 0:
        count_lowest.forward(scores.unsqueeze(1), k, counts.unsqueeze(0), magnitude)
    return scores.sum(-1, dtype=torch.float64)
