"""How often each node is among the lowest-scored of its layer."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from ...errors import check_choice
from ...options import Criterion
from .._dispatch import Backend, check_backend, register


def count_lowest(
    scores: Tensor,
    k: int,
    counts: Tensor | None = None,
    *,
    criterion: Criterion = "signed",
    backend: Backend | None = None,
) -> Tensor:
    """Add 1 to ``counts[l, j]`` for every sample in which j is among the k lowest of layer l.

    Equal scores are taken in index order, so the result is the same on every device.

    Args:
        scores: ``[N, L, D]``.
        k: how many a sample and layer, ``0 <= k <= D``.
        counts: ``[L, D]`` int64 to add to, in place; a new tensor by default.
        criterion: ``"signed"`` takes the smallest scores, ``"magnitude"`` the smallest absolute
            scores.
        backend: one of `BACKENDS`; None chooses (`loki_kernels.backends`).

    Returns:
        ``counts``.

    Raises:
        ValueError: for NaN scores, a k outside [0, D], an unknown criterion or backend, or counts
            of another shape.
        RuntimeError: if a backend asked for by name cannot run.
    """
    check_backend(backend)
    if scores.ndim != 3:
        raise ValueError(f"scores must be [N, L, D]; they are {tuple(scores.shape)}.")
    _, layers, width = scores.shape
    if not 0 <= k <= width:
        raise ValueError(f"k must lie in [0, {width}]; it is {k}.")
    check_choice("criterion", criterion, get_args(Criterion))
    if scores.numel() and scores.amax().isnan():  # one pass, and nothing as large as the scores
        raise ValueError("scores hold NaN; a rank among them means nothing.")
    if counts is None:
        counts = torch.zeros(layers, width, dtype=torch.int64, device=scores.device)
    elif counts.shape != (layers, width) or counts.dtype != torch.int64:
        raise ValueError(
            f"counts must be int64 [{layers}, {width}]; it is {counts.dtype} {tuple(counts.shape)}."
        )
    if k > 0:
        torch.ops.loki_kernels.count_lowest(scores, k, counts, criterion == "magnitude", backend)
    return counts


register(
    "count_lowest",
    "(Tensor scores, SymInt k, Tensor(a!) counts, bool magnitude) -> ()",
    lambda *_: None,
)
