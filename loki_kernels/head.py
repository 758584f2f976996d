"""The output head: what becomes of its products, and whether its logits are numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import explained
from .sharding import DTensor


@dataclass(frozen=True)
class Head:
    """The output projection: ``logits = softcap(scale * (hidden @ weight.T + bias))``."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """``[tokens, V]`` for hidden ``[tokens, D]``."""
        hidden = hidden.to(self.weight.device)
        products = nn.functional.linear(hidden, self.weight, self.bias)
        return scaled_and_capped(products, self.scale, self.softcap)

    def logit(self, hidden: Tensor, target: Tensor) -> Tensor:
        """One token's logit of each hidden state, ``[tokens]``, in float32 or float64.

        For hidden ``[tokens, D]`` and target ``[tokens]``: of the V products of `logits` one.
        """
        wide = torch.promote_types(hidden.dtype, torch.float32)
        product = (hidden.to(wide) * self.weight.detach()[target].to(wide)).sum(-1)
        if self.bias is not None:
            product = product + self.bias.detach()[target].to(wide)
        return scaled_and_capped(product, self.scale, self.softcap)


def scaled_and_capped(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits of an output head's products."""
    logits = products if scale == 1.0 else products * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logit_scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """What a text config says is done with the output head's products."""
    scale = 1.0
    for name in _MULTIPLIERS:
        if getattr(config, name, None) is not None:
            scale *= float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides
        scale /= float(config.logits_scaling)
    caps = (getattr(config, name, None) for name in _SOFTCAPS)
    return scale, next((float(cap) for cap in caps if cap is not None), None)


def possible_scales(config: Any) -> tuple[float, ...]:
    """What the products may be multiplied by, since families take ``logits_scaling`` differently.

    Granite divides the logits by it, HyperCLOVAX multiplies them, MiniCPM3 divides what enters the
    head; the first is what `logit_scale_and_softcap` says.
    """
    scale, _ = logit_scale_and_softcap(config)
    by = float(getattr(config, "logits_scaling", None) or 1.0)
    return (scale,) if by == 1.0 else (scale, scale * by * by, scale * by)


_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere's, Falcon-H1's
# Gemma's, RecurrentGemma's, xLSTM's
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def check_logits(model: nn.Module, logits: Tensor) -> None:
    """Raise ValueError if they are NaN."""
    if torch.isnan(logits).any():
        parameter = _first_non_finite(model)
        reason = f"; its parameter {parameter} is not finite" if parameter else " for these tokens"
        raise explained(ValueError(f"{type(model).__name__}'s logits are NaN{reason}."))


def _first_non_finite(model: nn.Module) -> str | None:
    """The name of the first parameter holding NaN or infinity, of those in this process."""
    for name, parameter in model.named_parameters():
        values = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if values.is_meta or not values.is_floating_point():
            continue
        if not torch.isfinite(values).all():
            return name
    return None
