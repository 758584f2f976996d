"""The weighted sum of path gradients that is an attribution score."""

from __future__ import annotations

from torch import Tensor

from .reference import integrate_path_reference


def integrate_path(
    gradients: Tensor,
    weights: Tensor,
    z: Tensor | None = None,
    baseline: Tensor | None = None,
) -> Tensor:
    """``(z - baseline) * sum_k weights_k * gradients_k``; without ``z``, the sum alone.

    Args:
        gradients: ``[B, m, D]``, the objective's gradient at each path point.
        weights: ``[m]`` or ``[B, m]``, the rule's weights (times any per-row factor).
        z: ``[B, D]``, the path's end.
        baseline: ``[B, D]`` or ``[D]``, the path's start; zero by default.

    Returns:
        ``[B, D]``, float32 (float64 for float64 gradients), summed in that precision.

    Raises:
        ValueError: if ``weights`` does not have one number a path point.
    """
    if gradients.ndim != 3:
        raise ValueError(
            "gradients must be [B, m, D] and weights [m] or [B, m]; they are "
            f"{list(gradients.shape)} and {list(weights.shape)}."
        )
    samples, points, _ = gradients.shape
    if tuple(weights.shape) not in ((points,), (samples, points)):
        raise ValueError(
            f"weights must be [{points}] or [{samples}, {points}]; they are {list(weights.shape)}."
        )
    return integrate_path_reference(gradients, weights, z, baseline)
