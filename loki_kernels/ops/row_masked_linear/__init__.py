"""A linear layer of which only some rows are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import (
    autocast,
    check_first_derivative,
    check_index,
    check_linear,
    check_shape,
    without_autocast,
)
from .._products import as_matrix, dense_linear, selected_columns, weight_gradient


def row_masked_linear(
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """``linear(x, weight with rows put at index, bias)``, differentiable in x, rows and bias.

    The meaning is ``F.linear(x, weight.index_copy(0, index, rows.to(weight.dtype)), bias)``.
    ``weight`` must already hold the rows (``weight[index] == rows.to(weight.dtype)``, which
    `LokiLinear` sees to), so the forward pass is one dense product with nothing copied; the
    backward pass is ``dX = dY @ weight`` and ``dW_S = dY[:, index].T @ X`` for those rows alone.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, merged; it gets no gradient.
        rows: ``[k, in_features]``, of any floating dtype; its gradient has its dtype. Its values
            are not read, so that it may as well be an update that the weight already holds.
        index: ``[k]`` int64 in [0, out_features), distinct, in any order.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]``. Under autocast, in the autocast dtype.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    _, in_features = check_linear(x, weight, bias)
    check_shape("rows", rows, check_index(index), in_features)
    x, weight, bias = autocast(x, weight, bias)
    return _RowMaskedLinear.apply(x, weight, rows, index, bias)


class _RowMaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        rows: Tensor,
        index: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        needs_x, _, needs_rows, *_ = ctx.needs_input_grad
        # `rows` is saved, though unused, so that autograd notices an optimizer step between the
        # forward and the backward pass.
        ctx.save_for_backward(x if needs_rows else None, weight if needs_x else None, rows, index)
        ctx.rows_dtype = rows.dtype
        with without_autocast(x):
            return dense_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        x, weight, _, index = ctx.saved_tensors
        grad_x = grad_rows = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
        if ctx.needs_input_grad[2]:
            selected = selected_columns(grad, index)
            grad_rows = weight_gradient(selected, as_matrix(x), ctx.rows_dtype)[: len(index)]
        if ctx.needs_input_grad[4]:
            grad_bias = as_matrix(grad).sum(0)
        return grad_x, None, grad_rows, None, grad_bias
