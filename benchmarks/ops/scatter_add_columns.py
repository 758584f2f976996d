"""`scatter_add_columns` of a dense update's product (rank 14336) and of one of rank 8."""

from __future__ import annotations

from ..measure import DTYPE
from .suite import Case, Work, normal, some_of

SHAPES = {
    "cuda": [
        {"tokens": n, "rank": r, "out_features": 4096} for n in (4096, 16384) for r in (14336, 8)
    ],
    "cpu": [{"tokens": 512, "rank": r, "out_features": 576} for r in (1536, 8)],
    "dry": [{"tokens": 5, "rank": 3, "out_features": 20}],
}


def make_case(tokens: int, rank: int, out_features: int) -> Case:
    k = out_features // 10
    inputs = {
        "y": normal(tokens, out_features),
        "index": some_of(out_features, k),
        "u": normal(tokens, rank),
        "v": normal(k, rank) / rank**0.5,
    }
    # u and v read once, the selected columns read and written
    moved = DTYPE.itemsize * (tokens * rank + k * rank + 2 * tokens * k)
    return Case(inputs, Work(2 * tokens * k * rank, moved))
