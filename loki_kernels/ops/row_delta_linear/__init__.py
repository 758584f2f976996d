"""A frozen linear layer plus an update of some of its rows."""

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
from .._directions import acting_factors, leave_out
from .._dispatch import Backend, check_backend
from .._products import as_matrix, dense_linear, padded_rows, selected_columns, weight_gradient
from ..scatter_add_columns import scatter_add_columns


def row_delta_linear(
    x: Tensor,
    weight: Tensor,
    delta_a: Tensor,
    delta_b: Tensor | None,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    directions: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """``linear(x, weight + scatter(index, delta), bias)`` without forming the sum.

    delta is ``delta_a @ delta_b``, the LoKI* form (arXiv 2505.22120), whose update costs two
    products of rank r, or ``delta_a`` itself where ``delta_b`` is None. The weight is never
    written: the form for one that is quantized, sharded or shared by several adapters.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, frozen.
        delta_a: ``[k, r]``; ``[k, in_features]`` if ``delta_b`` is None. Of any floating dtype; its
            gradient has its dtype.
        delta_b: ``[r, in_features]``, or None.
        index: ``[k]`` int64 in [0, out_features), distinct.
        bias: ``[out_features]`` or None.
        directions: orthonormal columns U ``[in_features, r]`` of any floating dtype that the update
            leaves alone: delta is ``delta_a @ delta_b (I - U U^T)``, or ``delta_a (I - U U^T)``. It
            is formed anew in the backward pass: kept, a protected update of all rows takes as much
            memory as the weights do in float32.
        backend: of `scatter_add_columns`.

    Returns:
        ``[..., out_features]`` in x's dtype (under autocast, in the autocast dtype), differentiable
        in x, delta_a, delta_b and bias. The update's products are those of x's dtype.

    Raises:
        ValueError: for shapes that do not fit together, or an unknown backend.
        RuntimeError: if a backend asked for by name cannot run.
    """
    check_backend(backend)
    _, in_features = check_linear(x, weight, bias)
    if delta_a.ndim != 2:
        raise ValueError(f"delta_a must be [k, r]; it is {list(delta_a.shape)}.")
    rank = in_features if delta_b is None else delta_a.shape[1]
    check_shape("delta_a", delta_a, check_index(index), rank)
    check_shape("delta_b", delta_b, rank, in_features)
    if directions is not None and (directions.ndim != 2 or len(directions) != in_features):
        raise ValueError(f"directions must be [{in_features}, r]; it is {list(directions.shape)}.")
    x, weight, bias = autocast(x, weight, bias)
    return _RowDeltaLinear.apply(x, weight, delta_a, delta_b, index, bias, directions, backend)


class _RowDeltaLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        delta_a: Tensor,
        delta_b: Tensor | None,
        index: Tensor,
        bias: Tensor | None,
        directions: Tensor | None,
        backend: str | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, delta_a, delta_b, index, directions)
        delta_a, delta_b = acting_factors(delta_a, delta_b, directions)
        with without_autocast(x):
            y = dense_linear(x, weight, bias)
            u = as_matrix(x)
            if delta_b is not None:
                u = u @ delta_b.to(x.dtype).t()
                # Of rank 8 torch took 24 us and Triton's kernel 38 (H200, 4,096 tokens), and of the
                # host 56 and 93.
                backend = backend or "torch"
            scatter_add_columns(as_matrix(y), index, u, delta_a.to(x.dtype), backend=backend)  # type: ignore[arg-type]
            return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        x, weight, delta_a, delta_b, index, directions = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, _, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = grad_bias = None
        if needs_x or needs_a or needs_b:
            delta_a, delta_b = acting_factors(delta_a, delta_b, directions)
            selected, flat = selected_columns(grad, index), as_matrix(x)
            if needs_a:
                u = flat if delta_b is None else flat @ delta_b.to(x.dtype).t()
                grad_a = weight_gradient(selected, u, delta_a.dtype)[: len(index)]
            # through the update, added within the product: by itself it would be written and read
            # again, at 4,096 tokens and 14336 -> 4096 .35 GB
            left, right = selected, padded_rows(delta_a, x.dtype)
            if delta_b is not None:
                through = left @ right  # the gradient of what delta_a multiplies
                if needs_b:
                    grad_b = weight_gradient(through, flat, delta_b.dtype)
                left, right = through, delta_b.to(x.dtype)
            if needs_x:
                grad_x = (as_matrix(grad) @ weight).addmm_(left, right).view(x.shape)
        if needs_bias:
            grad_bias = as_matrix(grad).sum(0)
        if delta_b is None and grad_a is not None:
            grad_a = leave_out(grad_a, directions)
        if grad_b is not None:
            grad_b = leave_out(grad_b, directions)
        return grad_x, None, grad_a, grad_b, None, grad_bias, None, None
