from __future__ import annotations

from torch import Tensor

from ..gated_product.reference import gated_product_reference
from ..row_masked_linear.reference import row_masked_linear_reference


def swiglu_row_masked_linear_reference(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    rows: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "silu",
) -> Tensor:
    product = gated_product_reference(gate, up, activation)
    return row_masked_linear_reference(product, weight, rows, index, bias)
