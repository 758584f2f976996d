"""The weighted sum of path gradients that is an attribution score."""

from __future__ import annotations

import torch
from torch import Tensor

from .._call import call
from .._check import check_shape
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
        weights: ``[m]`` or ``[B, m]``, the rule's weights (times a factor of each sample).
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
    fitting = gradients.shape[1:2], gradients.shape[:2]
    if gradients.ndim != 3 or weights.shape not in fitting:
        raise ValueError(
            "gradients must be [B, m, D] and weights [m] or [B, m]; they are "
            f"{list(gradients.shape)} and {list(weights.shape)}."
        )
    samples, _, width = gradients.shape
    check_shape("z", z, samples, width)
    if baseline is not None and tuple(baseline.shape) not in ((width,), (samples, width)):
        raise ValueError(
            f"baseline must be [{width}] or [{samples}, {width}]; it is {list(baseline.shape)}."
        )
    with torch.no_grad():
        return call("integrate_path", gradients, weights, z, baseline, backend)


def _fake(gradients: Tensor, *_: Tensor | None) -> Tensor:
    wide = torch.float64 if gradients.dtype == torch.float64 else torch.float32
    return gradients.new_empty(gradients.shape[0], gradients.shape[2], dtype=wide)


register(
    "integrate_path",
    "(Tensor gradients, Tensor weights, Tensor? z, Tensor? baseline) -> Tensor",
    _fake,
)
