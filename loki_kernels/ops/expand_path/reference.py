from __future__ import annotations

import torch
from torch import Tensor


def expand_path_reference(z: Tensor, alphas: Tensor, baseline: Tensor | None = None) -> Tensor:
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    step = alphas.to(device=z.device, dtype=wide)[:, None]
    if baseline is None:
        return (step * z.to(wide).unsqueeze(-2)).to(z.dtype)
    start = baseline.to(device=z.device, dtype=wide)
    return (start.unsqueeze(-2) + step * (z.to(wide) - start).unsqueeze(-2)).to(z.dtype)
