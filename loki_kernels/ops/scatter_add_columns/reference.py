from __future__ import annotations

from torch import Tensor

from .._example import Draw, Example


def scatter_add_columns_reference(y: Tensor, index: Tensor, u: Tensor, v: Tensor) -> Tensor:
    y[:, index] += u @ v.t()
    return y


def example(draw: Draw) -> Example:
    inputs = {
        "y": draw.normal(65, 129),
        "index": draw.index(37, 129),
        "u": draw.normal(65, 40),
        "v": draw.normal(37, 40),
    }
    return inputs, ()
