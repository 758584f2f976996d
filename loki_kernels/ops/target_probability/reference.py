from __future__ import annotations

import torch
from torch import Tensor

from .._example import Draw, Example


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


def example(draw: Draw) -> Example:
    inputs = {
        "hidden": draw.normal(33, 64),
        "weight": draw.normal(5000, 64) / 8,
        "target": draw.index(33, 5000),
        "bias": draw.normal(5000),
        "softcap": 5.0,
        "logit_scale": 0.5,
    }
    return inputs, ("hidden",)
