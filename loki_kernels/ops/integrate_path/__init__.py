"""The weighted sum of path gradients that is an attribution score."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import check_baseline, check_path, check_shape
from .._dispatch import Backend, check_backend, register


def integrate_path(
    gradients: Tensor,
    weights: Tensor,
    z: Tensor | None = None,
    baseline: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """``(z - baseline) * sum_k weights_k * gradients_k``; without ``z``, the sum alone.

    Args:
        gradients: ``[B, m, D]``, the objective's gradient at each path point.
        weights: ``[m]`` or ``[B, m]``, the rule's weights (times any factor of the sample).
        z: ``[B, D]``, the path's end.
        baseline: ``[B, D]`` or ``[D]``, the path's start; zero by default.
        backend: one of `BACKENDS`; None chooses (`loki_kernels.backends`).

    Returns:
        ``[B, D]``, float32 (float64 for float64 gradients), summed in that precision; no
        gradient.

    Raises:
        ValueError: for shapes that do not fit, or an unknown backend.
        RuntimeError: if a backend asked for by name cannot run.
    """
    check_backend(backend)
    samples, width = check_path(gradients, weights)
    check_shape("z", z, samples, width)
    check_baseline(baseline, samples, width)
    with torch.no_grad():
        return torch.ops.loki_kernels.integrate_path(gradients, weights, z, baseline, backend)


def _fake(gradients: Tensor, *_: Tensor | None) -> Tensor:
    wide = torch.float64 if gradients.dtype == torch.float64 else torch.float32
    return gradients.new_empty(gradients.shape[0], gradients.shape[2], dtype=wide)


register(
    "integrate_path",
    "(Tensor gradients, Tensor weights, Tensor? z, Tensor? baseline) -> Tensor",
    _fake,
)
