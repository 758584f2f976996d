"""The probability a language-model head gives one token a row, without keeping the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._check import check_linear, check_shape

# Logits alive at once, in elements: 32 Mi float32 = 128 MiB, 680 rows of a 49,152-token
# vocabulary. Larger chunks were not faster on 2 cores.
_CHUNK_ELEMENTS = 1 << 25


class TargetProbability(NamedTuple):
    """Each ``[rows]``, float32 (float64 for a float64 model)."""

    probability: Tensor
    logit: Tensor
    log_probability: Tensor


def target_probability(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TargetProbability:
    """Softmax probability, logit and log-probability of ``target`` for each row.

    ``logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``. Differentiable
    in ``hidden`` alone; the gradient is formed in the forward pass while a chunk's logits are
    alive, so the backward pass costs no second product and stores ``[rows, D]``, not ``[rows, V]``.

    Args:
        hidden: ``[rows, D]``.
        weight: ``[V, D]``.
        target: ``[rows]`` token ids.
        bias: ``[V]`` or None.
        softcap: final logit soft-cap (Gemma-2).
        logit_scale: factor on the logits (Cohere, Granite).

    Raises:
        ValueError: for shapes that do not fit together.
    """
    check_linear(hidden, weight, bias)
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [rows, D]; it is {list(hidden.shape)}.")
    check_shape("target", target, hidden.shape[0])
    return TargetProbability(
        *_TargetProbability.apply(hidden, weight, target, bias, softcap, logit_scale)
    )


class _TargetProbability(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = hidden.shape[0]
        logit = torch.empty(rows, dtype=wide, device=hidden.device)
        log_probability = torch.empty_like(logit)
        needs_gradient = ctx.needs_input_grad[0]
        # d log p / d hidden and d logit / d hidden, the two directions every output is made of
        pull = torch.empty_like(hidden) if needs_gradient else None
        slope = torch.empty_like(logit) if needs_gradient else None

        chunk = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = torch.nn.functional.linear(hidden[part], weight, bias).to(wide)
            if logit_scale != 1.0:
                logits = logits.mul_(logit_scale)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            index = target[part, None]
            logit[part] = logits.gather(1, index).squeeze(1)
            log_normaliser = torch.logsumexp(logits, dim=1)
            log_probability[part] = logit[part] - log_normaliser
            if needs_gradient:
                gradient = torch.exp(logits - log_normaliser[:, None]).neg_()
                gradient.scatter_add_(1, index, torch.ones_like(index, dtype=wide))
                slope_part = torch.full_like(log_normaliser, logit_scale)
                if softcap is not None:
                    gradient.mul_(logits.div_(softcap).square_().neg_().add_(1.0))
                    slope_part *= 1.0 - (logit[part] / softcap).square()
                pull[part] = gradient.mul_(logit_scale).to(hidden.dtype) @ weight
                slope[part] = slope_part
        probability = log_probability.exp()
        if needs_gradient:
            ctx.save_for_backward(probability, pull, slope, weight, target)
        return probability, logit, log_probability

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_probability, grad_logit, grad_log_probability = grads
        probability, pull, slope, weight, target = ctx.saved_tensors
        along_pull = grad_probability * probability + grad_log_probability
        # Summed in float32: rounding each term to 16 bits first was up to 4.7 times worse.
        grad_hidden = pull.to(along_pull.dtype) * along_pull[:, None]
        if grad_logit.any():
            grad_hidden += weight[target].to(along_pull.dtype) * (grad_logit * slope)[:, None]
        grad_hidden = grad_hidden.to(pull.dtype)
        return grad_hidden, None, None, None, None, None
