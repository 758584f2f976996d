"""`sync_rows`: a tenth of every down-projection's rows written; and all rows of one."""

from __future__ import annotations

import torch

from ..measure import DTYPE
from .suite import Case, Work, normal, some_of

_DOWN = {"in_features": 14336, "out_features": 4096}
_SMALL = {"in_features": 1536, "out_features": 576}
SHAPES = {
    "cuda": [{"layers": 32, **_DOWN, "rows": 409}, {"layers": 1, **_DOWN, "rows": 4096}],
    "cpu": [{"layers": 8, **_SMALL, "rows": 57}, {"layers": 1, **_SMALL, "rows": 576}],
    "dry": [{"layers": 2, "in_features": 12, "out_features": 20, "rows": 2}],
}


def make_case(layers: int, in_features: int, out_features: int, rows: int) -> Case:
    k = rows
    inputs = {
        "weights": [normal(out_features, in_features) for _ in range(layers)],
        "base": [normal(k, in_features) for _ in range(layers)],
        "updates": [normal(k, in_features, dtype=torch.float32) for _ in range(layers)],
        "indices": [some_of(out_features, k) for _ in range(layers)],
    }
    return Case(inputs, Work(0, layers * k * in_features * (4 + 2 * DTYPE.itemsize)))
