from __future__ import annotations

from torch import Tensor


def forward(scores: Tensor, k: int, counts: Tensor, magnitude: bool) -> None:
    values = scores.abs() if magnitude else scores
    # The k-th smallest value splits the nodes without sorting them all: everything below it is
    # in, and of those equal to it the first ones by index.
    threshold = values.topk(k, dim=-1, largest=False).values.amax(-1, keepdim=True)
    below = values < threshold
    equal = values == threshold
    wanted = k - below.sum(-1, keepdim=True)
    taken = below | (equal & (equal.cumsum(-1) <= wanted))
    counts += taken.sum(0)
