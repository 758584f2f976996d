"""A frozen linear layer plus a low-rank update of some of its rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .._check import check_index, check_linear, check_shape


def row_delta_linear(
    x: Tensor,
    weight: Tensor,
    delta_a: Tensor,
    delta_b: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """``linear(x, weight + scatter(index, delta_a @ delta_b), bias)`` without forming the sum.

    The LoKI* form (arXiv 2505.22120): rows ``index`` of the frozen weight get ``A @ B``. The weight
    is never written; the update costs two products of rank r.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, frozen.
        delta_a: ``[k, r]``.
        delta_b: ``[r, in_features]``.
        index: ``[k]`` int64, distinct.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]``. Differentiable in x, delta_a, delta_b and bias.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    _, in_features = check_linear(x, weight, bias)
    if delta_a.ndim != 2:
        raise ValueError(f"delta_a must be [k, r]; it is {list(delta_a.shape)}.")
    check_shape("delta_a", delta_a, check_index(index), delta_a.shape[1])
    check_shape("delta_b", delta_b, delta_a.shape[1], in_features)
    y = functional.linear(x, weight, bias)
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(delta_b.dtype)
    delta = functional.linear(functional.linear(x, delta_b), delta_a)
    return y.index_add(-1, index, delta.to(y.dtype))
