from __future__ import annotations

from torch import Tensor

from .._example import Draw, Example


def gather_columns_reference(x: Tensor, index: Tensor) -> Tensor:
    return x[:, index]


def example(draw: Draw) -> Example:
    return {"x": draw.normal(65, 129), "index": draw.index(37, 129)}, ()
