"""The points of an integration path."""

from __future__ import annotations

import torch
from torch import Tensor


def steps_for(z: Tensor, alphas: Tensor) -> Tensor:
    """``alphas`` where z is, float32 (float64 for float64), in which points are computed."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    # Waiting for so few numbers would be waiting for the device, at every layer. Apple's reads them
    # later, when torch has given their memory back (before 2.12 at least).
    return alphas.to(device=z.device, dtype=wide, non_blocking=z.is_cuda)


def path_points(z: Tensor, alphas: Tensor, baseline: Tensor | None = None) -> Tensor:
    """``baseline + alpha_k * (z - baseline)`` for every k.

    Args:
        z: ``[B, D]``, the path's end.
        alphas: ``[m]`` floats, or `steps_for` made of them.
        baseline: ``[B, D]`` or ``[D]``, the path's start; zero by default.

    Returns:
        ``[B, m, D]``, contiguous, computed in float32 (float64 for float64) and rounded once, to
        z's dtype.
    """
    step = steps_for(z, alphas)[:, None]
    end = z.to(step.dtype).unsqueeze(1)
    if baseline is None:
        return (step * end).to(z.dtype).contiguous()
    start = baseline.to(device=z.device, dtype=step.dtype).unsqueeze(-2)
    return (start + step * (end - start)).to(z.dtype).contiguous()
