"""From gradients on the path to scores, and how two results of one model are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..ops import integrate_path
from ..structure import in_float64
from .definitions import PathIntegral
from .scores import Scores

# Largest relative difference allowed between the unperturbed point's logits and the whole prompt's:
# the same numbers through products of another shape. Measured on SmolLM2-135M: 2e-6 (float32),
# 1e-2 (bfloat16).
_GUARD_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}


def guard_tolerance(*dtypes: torch.dtype) -> float:
    """The coarsest of some dtypes': bfloat16 models may return float32 logits (Nemotron-H)."""
    return max(_GUARD_TOLERANCE[dtype] for dtype in dtypes)


def to_differentiate(objectives: Mapping[str, Tensor], objective: str) -> tuple[Tensor, Tensor]:
    """What an objective of points is differentiated through, and what that is divided by.

    The gradient of p is p times that of log p, which does not underflow in float16. d log p is
    1 - p times d log-odds, which of a token that the model is sure of makes float16's gradients
    zero: they are formed without it, and `integrate` multiplies by it in float32. A logit is
    divided by ones.
    """
    if objective == "logit":
        logit = objectives["logit"]
        return logit, torch.ones_like(logit)
    log_probability = objectives["log_probability"]
    least = torch.finfo(log_probability.dtype).eps
    left = (-torch.expm1(log_probability.detach())).clamp_min(least)
    return log_probability / left, left


def integrate(
    integral: PathIntegral,
    values: Tensor,
    left: Tensor,
    gradients: Sequence[Tensor],
    ends: Sequence[Tensor],
    starts: Sequence[Tensor] | None,
    target: Tensor,
) -> Scores:
    """Scores of some layers, all at once: a launch a layer costs the host 20 to 60 times the
    device's work.

    Args:
        integral: what is integrated.
        values: ``[B, 1 + L * m]``, F of the unperturbed point and of each layer's points.
        left: what `to_differentiate` has divided the same points by.
        gradients: L of ``[B, m, D]``, of log p (where F is a probability too) divided by ``left``.
        ends: L of z ``[B, D]``.
        starts: L of the baseline ``[B, D]``; None for zero.
        target: int64 ``[B]``.
    """
    definition, alphas = integral.definition, integral.alphas
    layers, samples, m, device = len(gradients), len(values), len(alphas), values.device

    def stacked(of_layers: Iterable[Tensor]) -> Tensor:
        """L of ``[B, ...]`` as ``[L * B, ...]``; layers may lie on several devices."""
        return torch.stack([x.to(device) for x in of_layers]).flatten(0, 1)

    at_points = values[:, 1:].view(samples, layers, m)
    weights = integral.weights.to(values, non_blocking=values.is_cuda)
    weights = weights * left[:, 1:].view_as(at_points)
    if definition.objective == "probability":
        weights = weights * at_points
    z = start = None
    if definition.multiply:
        z = stacked(ends)
        start = None if starts is None else stacked(starts)
    weights = weights.expand_as(at_points).transpose(0, 1).flatten(0, 1)
    scores = integrate_path(stacked(gradients), weights, z, start)
    start_point = (alphas == 0).nonzero().flatten()
    change = (
        values[:, :1] - at_points[:, :, int(start_point[0])]
        if len(start_point)
        else torch.full_like(at_points[:, :, 0], float("nan"))
    )
    return Scores(scores.view(layers, samples, -1).transpose(0, 1), change, values[:, 0], target)


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest of the samples' errors; infinite where one is NaN."""
    got, want = in_float64(got.to(want.device)), in_float64(want)
    error = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)
    return float(error.nan_to_num(nan=float("inf")).max())
