"""How many rows a percentage is, and how often each node is among a sample's extreme ones."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from .ops import count_lowest
from .options import Criterion

# Scores read at a time, in elements: 64 MiB of float32.
_CHUNK_ELEMENTS = 1 << 24


def rows_per_layer(quota: float | Fraction, width: int) -> int:
    """``max(1, floor(quota * width / 100))`` in exact arithmetic: 29 % of 100 is 29.

    Raises:
        ValueError: for a quota outside (0, 100].
    """
    if isinstance(quota, bool):
        raise ValueError("quota must be a percentage in (0, 100]; it is a bool.")
    try:
        exact = Fraction(str(quota))
    except ValueError:
        raise ValueError(f"quota must be a percentage in (0, 100]; it is {quota!r}.") from None
    if not 0 < exact <= 100:
        raise ValueError(f"quota must be a percentage in (0, 100]; it is {quota}.")
    return max(1, int(exact * width // 100))


def in_parts(scores: Tensor) -> tuple[Tensor, ...]:
    """``[N, L, D]`` by as many samples as are read at a time: it may be larger than memory."""
    _, layers, width = scores.shape
    parts: tuple[Tensor, ...] = scores.split(max(1, _CHUNK_ELEMENTS // (layers * width)))
    return parts


def count_extreme(scores: Tensor, k: int, highest: bool, criterion: Criterion) -> Tensor:
    """In how many samples each node is among the k highest or lowest of its layer, ``[L, D]``."""
    counts = torch.zeros(scores.shape[1:], dtype=torch.int64, device=scores.device)
    for part in in_parts(scores):
        if highest:
            part = -(part.abs() if criterion == "magnitude" else part)
            count_lowest(part, k, counts)
        else:
            count_lowest(part, k, counts, criterion=criterion)
    return counts


def most_frequent(counts: Tensor, k: int) -> Tensor:
    return counts.argsort(descending=True, stable=True)[:k].cpu()
