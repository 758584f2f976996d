"""How often each node is among the lowest-scored of its layer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Criterion = Literal["signed", "magnitude"]


def count_lowest(
    scores: Tensor,
    k: int,
    counts: Tensor | None = None,
    *,
    criterion: Criterion = "signed",
) -> Tensor:
    """Add 1 to ``counts[l, j]`` for every sample in which j is among the k lowest of layer l.

    Equal scores are taken in index order, so the result is the same on every device.

    Args:
        scores: ``[N, L, D]``.
        k: how many a sample and layer, ``0 <= k <= D``.
        counts: ``[L, D]`` int64 to add to, in place; a new tensor by default.
        criterion: ``"signed"`` takes the smallest scores, ``"magnitude"`` the smallest absolute
            scores.

    Returns:
        ``counts``.

    Raises:
        ValueError: for NaN scores, a k outside [0, D], an unknown criterion, or counts of another
            shape.
    """
    if scores.ndim != 3:
        raise ValueError(f"scores must be [N, L, D]; they are {tuple(scores.shape)}.")
    _, layers, width = scores.shape
    if not 0 <= k <= width:
        raise ValueError(f"k must lie in [0, {width}]; it is {k}.")
    if criterion not in ("signed", "magnitude"):
        raise ValueError(f"criterion must be 'signed' or 'magnitude'; it is {criterion!r}.")
    if torch.isnan(scores).any():
        raise ValueError("scores hold NaN; a rank among them means nothing.")
    if counts is None:
        counts = torch.zeros(layers, width, dtype=torch.int64, device=scores.device)
    elif counts.shape != (layers, width) or counts.dtype != torch.int64:
        raise ValueError(
            f"counts must be int64 [{layers}, {width}]; it is {counts.dtype} {tuple(counts.shape)}."
        )
    if k == 0:
        return counts
    values = scores.abs() if criterion == "magnitude" else scores
    # The k-th smallest value splits the nodes without sorting them all: everything below it is
    # in, and of those equal to it the first ones by index.
    threshold = values.topk(k, dim=-1, largest=False).values.amax(-1, keepdim=True)
    below = values < threshold
    equal = values == threshold
    wanted = k - below.sum(-1, keepdim=True)
    taken = below | (equal & (equal.cumsum(-1) <= wanted))
    counts += taken.sum(0)
    return counts
