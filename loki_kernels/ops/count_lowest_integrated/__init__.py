"""`integrate_path` and `count_lowest` in one, for an analysis that keeps no scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._check import check_baseline, check_path, check_shape
from .._dispatch import Backend, check_backend, register
from ..count_lowest import Criterion, check_count


class LowestCounts(NamedTuple):
    """What `count_lowest_integrated` returns.

    Attributes:
        counts: int64 ``[D]``.
        sums: float64 ``[B]``, each sample's sum of scores.
    """

    counts: Tensor
    sums: Tensor


def count_lowest_integrated(
    gradients: Tensor,
    weights: Tensor,
    z: Tensor | None,
    baseline: Tensor | None,
    k: int,
    counts: Tensor | None = None,
    *,
    criterion: Criterion = "signed",
    backend: Backend | None = None,
) -> LowestCounts:
    """Add 1 to ``counts[j]`` for every sample in which j has one of the k lowest scores.

    The scores are ``integrate_path(gradients, weights, z, baseline)``; the kernel for them writes
    none to memory. Equal scores are taken in index order.

    Args:
        gradients: ``[B, m, D]``, one layer's gradient at each path point.
        weights: ``[m]`` or ``[B, m]``, the rule's weights (times any per-row factor).
        z: ``[B, D]``, the path's end, or None.
        baseline: ``[B, D]`` or ``[D]``, the path's start, or None.
        k: how many a sample, ``0 <= k <= D``.
        counts: ``[D]`` int64 to add to, in place; a new tensor by default.
        criterion: ``"signed"`` takes the smallest scores, ``"magnitude"`` the smallest absolute
            scores.
        backend: one of `BACKENDS`; None chooses (`loki_kernels.backends`).

    Returns:
        ``counts`` and the samples' sums of scores. A sample with a NaN score counts nothing, and
        its sum is NaN; looking for one here would have to wait for the device.

    Raises:
        ValueError: for shapes that do not fit, a k outside [0, D], an unknown criterion or backend,
            or counts of another shape.
        RuntimeError: if a backend asked for by name cannot run.
    """
    check_backend(backend)
    samples, width = check_path(gradients, weights)
    check_shape("z", z, samples, width)
    check_baseline(baseline, samples, width)
    check_count(k, criterion, width)
    if counts is None:
        counts = torch.zeros(width, dtype=torch.int64, device=gradients.device)
    elif counts.shape != (width,) or counts.dtype != torch.int64:
        raise ValueError(
            f"counts must be int64 [{width}]; it is {counts.dtype} {tuple(counts.shape)}."
        )
    with torch.no_grad():
        sums = torch.ops.loki_kernels.count_lowest_integrated(
            gradients, weights, z, baseline, k, counts, criterion == "magnitude", backend
        )
    return LowestCounts(counts, sums)


register(
    "count_lowest_integrated",
    "(Tensor gradients, Tensor weights, Tensor? z, Tensor? baseline, SymInt k, Tensor(a!) counts, "
    "bool magnitude) -> Tensor",
    lambda gradients, *_: gradients.new_empty(gradients.shape[0], dtype=torch.float64),
)
