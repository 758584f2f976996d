"""The points of an integration path."""

from __future__ import annotations

import torch
from torch import Tensor


def path_points(z: Tensor, alphas: Tensor, baseline: Tensor | None = None) -> Tensor:
    """``baseline + alpha_k * (z - baseline)`` for every k.

    Args:
        z: ``[B, D]``, the path's end.
        alphas: ``[m]`` floats.
        baseline: ``[B, D]`` or ``[D]``, the path's start; zero by default.

    Returns:
        ``[B, m, D]``, contiguous, computed in float32 (float64 for float64) and rounded once, to
        z's dtype.
    """
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    # Waiting for so few numbers would be waiting for the device, at every layer.
    step = alphas.to(device=z.device, dtype=wide, non_blocking=True)[:, None]
    end = z.to(wide).unsqueeze(1)
    if baseline is None:
        return (step * end).to(z.dtype).contiguous()
    start = baseline.to(device=z.device, dtype=wide).unsqueeze(-2)
    return (start + step * (end - start)).to(z.dtype).contiguous()
