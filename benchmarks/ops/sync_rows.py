"""`sync_rows` of a whole model: a tenth of every down-projection's rows written back."""

from __future__ import annotations

import torch

from ..measure import DTYPE
from .suite import Case, Work, normal, some_of

_MODEL = {"layers": 32, "in_features": 14336, "out_features": 4096}
SHAPES = {
    "cuda": [{**_MODEL, "rows_dtype": name} for name in ("float32", "bfloat16")],
    "cpu": [{"layers": 8, "in_features": 1536, "out_features": 576, "rows_dtype": "float32"}],
    "dry": [{"layers": 2, "in_features": 12, "out_features": 20, "rows_dtype": "float32"}],
}


def make_case(layers: int, in_features: int, out_features: int, rows_dtype: str) -> Case:
    k, dtype = out_features // 10, getattr(torch, rows_dtype)
    inputs = {
        "weights": [normal(out_features, in_features) for _ in range(layers)],
        "rows": [normal(k, in_features, dtype=dtype) for _ in range(layers)],
        "indices": [some_of(out_features, k) for _ in range(layers)],
    }
    return Case(inputs, Work(0, layers * k * in_features * (dtype.itemsize + DTYPE.itemsize)))
