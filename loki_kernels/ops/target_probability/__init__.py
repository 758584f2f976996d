"""The probability a language-model head gives one target a token, without keeping the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._call import call
from .._check import check_linear, check_shape
from .._dispatch import Backend, check_backend, register, register_autograd


class TargetProbability(NamedTuple):
    """Each ``[tokens]``, float32 (float64 for a float64 model)."""

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
    backend: Backend | None = None,
) -> TargetProbability:
    """Softmax probability, logit and log-probability of ``target`` at each token.

    ``logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``. Differentiable
    in ``hidden`` alone; the gradient is formed in the forward pass while a chunk's logits are
    alive, so the backward pass costs no second product and stores ``[tokens, D]``, not
    ``[tokens, V]``.

    Args:
        hidden: ``[tokens, D]``.
        weight: ``[V, D]``.
        target: ``[tokens]`` token ids.
        bias: ``[V]`` or None.
        softcap: final logit soft-cap (Gemma-2).
        logit_scale: factor on the logits (Cohere, Granite).
        backend: one of `BACKENDS`; None chooses (`loki_kernels.backends`).

    Raises:
        ValueError: for shapes that do not fit together, or an unknown backend.
        RuntimeError: if a backend asked for by name cannot run.
    """
    check_backend(backend)
    check_linear(hidden, weight, bias)
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [tokens, D]; it is {list(hidden.shape)}.")
    check_shape("target", target, hidden.shape[0])
    gradient = torch.is_grad_enabled() and hidden.requires_grad
    outputs = call(
        "target_probability",
        hidden,
        weight.detach(),
        target,
        None if bias is None else bias.detach(),
        None if softcap is None else float(softcap),
        float(logit_scale),
        gradient,
        backend,
    )
    return TargetProbability(*outputs[:3])


def _fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    gradient: bool,
) -> tuple[Tensor, ...]:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    tokens = hidden.shape[0]
    kept = tokens if gradient else 0
    numbers = [hidden.new_empty(tokens, dtype=wide) for _ in range(3)]
    return *numbers, hidden.new_empty(kept, hidden.shape[1]), hidden.new_empty(kept, dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, target, *_ = inputs
    probability, _, log_probability, pull, slope = output
    ctx.mark_non_differentiable(pull, slope)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(probability, log_probability, pull, slope, weight, target)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_probability, grad_logit, grad_log_probability = grads[:3]
    probability, log_probability, pull, slope, weight, target = ctx.saved_tensors
    left = -torch.expm1(log_probability)  # 1 - p, to its last digits
    # Summed in float32: rounding each term to 16 bits first was up to 4.7 times worse.
    grad_hidden = torch.zeros(pull.shape, dtype=slope.dtype, device=pull.device)
    if grad_probability is not None:
        grad_hidden = torch.addcmul(
            grad_hidden, pull, (grad_probability * probability * left)[:, None]
        )
    if grad_log_probability is not None:
        grad_hidden = torch.addcmul(grad_hidden, pull, (grad_log_probability * left)[:, None])
    if grad_logit is not None:
        grad_hidden = torch.addcmul(grad_hidden, weight[target], (grad_logit * slope)[:, None])
    return grad_hidden.to(pull.dtype), *[None] * 7


# The last two results are kept for the backward pass, and empty without a gradient: the two
# directions every output's gradient is made of are d log-odds / d hidden, "pull" [tokens, D], and
# d logit / d hidden = "slope" [tokens] times the target's row of the weight. d log p is 1 - p times
# the former: of a token that the model is sure of, log p as a logit less the normaliser has no more
# digits than the logit, 2e-6 of one above 16, and 1 - p = 1e-6 would be nothing or twice as much.
register(
    "target_probability",
    "(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float? softcap, "
    "float logit_scale, bool gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
register_autograd("target_probability", _setup_context, _backward)
