"""`row_delta_linear` of a tenth of the rows, dense (rank 0) or of rank 8; and of all, dense."""

from __future__ import annotations

from ..measure import DTYPE
from .suite import Case, Work, normal, some_of

_DOWN = {"in_features": 14336, "out_features": 4096}
SHAPES = {
    "cuda": [
        {"tokens": n, **_DOWN, "rows": k, "rank": r}
        for n in (4096, 16384)
        for k, r in ((409, 0), (409, 8), (4096, 0))
    ],
    "cpu": [
        {"tokens": 256, "in_features": 1536, "out_features": 576, "rows": k, "rank": r}
        for k, r in ((57, 0), (57, 8), (576, 0))
    ],
    "dry": [
        {"tokens": 5, "in_features": 12, "out_features": 20, "rows": k, "rank": r}
        for k, r in ((2, 0), (2, 3), (20, 0))
    ],
}


def make_case(tokens: int, in_features: int, out_features: int, rows: int, rank: int) -> Case:
    k = rows
    inputs = {
        "x": normal(tokens, in_features),
        "weight": normal(out_features, in_features) / in_features**0.5,
        "delta_a": normal(k, rank or in_features) / 100,
        "delta_b": normal(rank, in_features) / 10 if rank else None,
        "index": some_of(out_features, k),
    }
    dense, selected = 2 * tokens * in_features * out_features, 2 * tokens * k * in_features
    # A dense update is not multiplied: one product with the weight and it, summed, is enough.
    low = 2 * tokens * rank * (in_features + k)
    update = k * in_features if not rank else rank * (k + in_features)
    ends = tokens * (in_features + out_features) + out_features * in_features
    # backward: through the update to x, and its own gradient
    forward = Work(dense + low, DTYPE.itemsize * (ends + update))
    backward = Work(
        dense + (2 * low or selected),
        DTYPE.itemsize * (ends + tokens * in_features + 2 * update),
    )
    differentiable = ("x", "delta_a", "delta_b") if rank else ("x", "delta_a")
    return Case(inputs, forward, backward, differentiable)
