"""`row_delta_linear` of a tenth of the rows, their update dense (rank 0 here) and of rank 8."""

from __future__ import annotations

from ..measure import DTYPE
from .suite import Case, Work, normal, some_of

BACKENDS_OF = "scatter_add_columns"
_DOWN = {"in_features": 14336, "out_features": 4096}
SHAPES = {
    "cuda": [{"tokens": n, **_DOWN, "rank": r} for n in (4096, 16384) for r in (0, 8)],
    "cpu": [{"tokens": 256, "in_features": 1536, "out_features": 576, "rank": r} for r in (0, 8)],
    "dry": [{"tokens": 5, "in_features": 12, "out_features": 20, "rank": r} for r in (0, 3)],
}


def make_case(tokens: int, in_features: int, out_features: int, rank: int) -> Case:
    k = out_features // 10
    inputs = {
        "x": normal(tokens, in_features),
        "weight": normal(out_features, in_features) / in_features**0.5,
        "delta_a": normal(k, rank or in_features) / 100,
        "delta_b": normal(rank, in_features) / 10 if rank else None,
        "index": some_of(out_features, k),
    }
    dense, selected = 2 * tokens * in_features * out_features, 2 * tokens * k * in_features
    low = 2 * tokens * rank * (in_features + k)
    update = k * in_features if not rank else rank * (k + in_features)
    ends = tokens * (in_features + out_features) + out_features * in_features
    # backward: through the update to x, and its own gradient
    forward = Work(dense + (low or selected), DTYPE.itemsize * (ends + update))
    backward = Work(
        dense + 2 * (low or selected), DTYPE.itemsize * (ends + tokens * in_features + 2 * update)
    )
    differentiable = ("x", "delta_a", "delta_b") if rank else ("x", "delta_a")
    return Case(inputs, forward, backward, differentiable)
