"""The m points of an integration path."""

from __future__ import annotations

from torch import Tensor

from .reference import expand_path_reference


def expand_path(z: Tensor, alphas: Tensor, baseline: Tensor | None = None) -> Tensor:
    """``baseline + alpha_k * (z - baseline)`` for every k.

    Args:
        z: ``[B, D]``, the path's end.
        alphas: ``[m]`` floats.
        baseline: ``[B, D]`` or ``[D]``, the path's start; zero by default.

    Returns:
        ``[B, m, D]`` in z's dtype.

    Raises:
        ValueError: if ``z`` or ``alphas`` has another number of dimensions.
    """
    if z.ndim != 2 or alphas.ndim != 1:
        raise ValueError(
            f"z must be [B, D] and alphas [m]; they are {tuple(z.shape)} and {tuple(alphas.shape)}."
        )
    return expand_path_reference(z, alphas, baseline)
