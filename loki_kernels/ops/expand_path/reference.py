from __future__ import annotations

import torch
from torch import Tensor

from .._example import Draw, Example


def expand_path_reference(z: Tensor, alphas: Tensor, baseline: Tensor | None = None) -> Tensor:
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    step = alphas.to(device=z.device, dtype=wide)[:, None]
    if baseline is None:
        return (step * z.to(wide).unsqueeze(-2)).to(z.dtype)
    start = baseline.to(device=z.device, dtype=wide)
    return (start.unsqueeze(-2) + step * (z.to(wide) - start).unsqueeze(-2)).to(z.dtype)


def example(draw: Draw) -> Example:
    z, baseline = draw.normal(2, 3, 129)
    return {"z": z, "alphas": torch.linspace(0, 1, 7), "baseline": baseline}, ("z", "baseline")
