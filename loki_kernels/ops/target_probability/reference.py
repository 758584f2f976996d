from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def target_probability_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(probability, logit, log-probability), each ``[tokens]``."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = torch.nn.functional.linear(hidden, weight, bias).to(wide) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probabilities = torch.log_softmax(logits, dim=-1)
    logit = logits.gather(1, target[:, None]).squeeze(1)
    log_probability = log_probabilities.gather(1, target[:, None]).squeeze(1)
    return log_probability.exp(), logit, log_probability


def example(
    device: torch.device | str, dtype: torch.dtype
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Keyword arguments of a small case, and which of them are differentiable."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    inputs = {
        "hidden": normal(33, 64),
        "weight": normal(5000, 64) / 8,
        "target": torch.randint(0, 5000, (33,), generator=generator).to(device),
        "bias": normal(5000),
        "softcap": 5.0,
        "logit_scale": 0.5,
    }
    return inputs, ("hidden",)
