"""`swiglu_row_masked_linear`: an FFN's activation and its down-projection, a tenth trained."""

from __future__ import annotations

from ..measure import DTYPE
from .suite import Case, Work, normal, some_of

BACKENDS_OF = "gated_product"
SHAPES = {
    "cuda": [{"tokens": n, "in_features": 14336, "out_features": 4096} for n in (4096, 16384)],
    "cpu": [{"tokens": 256, "in_features": 1536, "out_features": 576}],
    "dry": [{"tokens": 5, "in_features": 12, "out_features": 20}],
}


def make_case(tokens: int, in_features: int, out_features: int) -> Case:
    gate, up = normal(2, tokens, in_features)
    weight = normal(out_features, in_features) / in_features**0.5
    index = some_of(out_features, out_features // 10)
    inputs = {
        "gate": gate,
        "up": up,
        "weight": weight,
        "rows": weight[index],
        "index": index,
    }
    dense = 2 * tokens * in_features * out_features
    ends = weight.numel() + tokens * out_features
    trained = inputs["rows"].numel()
    forward = Work(dense, DTYPE.itemsize * (ends + 2 * gate.numel()))
    backward = Work(
        dense + 2 * tokens * trained, DTYPE.itemsize * (ends + 4 * gate.numel() + trained)
    )
    return Case(inputs, forward, backward, ("gate", "up", "rows"))
