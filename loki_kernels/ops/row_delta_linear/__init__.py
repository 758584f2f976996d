"""A frozen linear layer plus an update of some of its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._check import (
    autocast,
    check_first_derivative,
    check_index,
    check_linear,
    check_shape,
    without_autocast,
)
from .._directions import acting_factors, keep, kept, leave_out
from .._products import (
    add_columns,
    as_matrix,
    dense_linear,
    padded_rows,
    rounded_sum,
    selected_columns,
    unviewed,
    weight_gradient,
)

# From this share of the rows and these tokens on, the sum of weight and update is formed and one
# product made with it: of all rows at 4,096 tokens, 14336 -> 4096, that moves .9 GB and spares .48
# TFLOP each way. At the one token of a generation it would move twice what the weights are.
_MANY, _TOKENS = 0.5, 512


def row_delta_linear(
    x: Tensor,
    weight: Tensor,
    delta_a: Tensor,
    delta_b: Tensor | None,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    directions: Tensor | None = None,
) -> Tensor:
    """``linear(x, weight + scatter(index, delta), bias)`` without writing into the weight.

    delta is ``delta_a @ delta_b``, the LoKI* form (arXiv 2505.22120), whose update costs two
    products of rank r, or ``delta_a`` itself where ``delta_b`` is None: the form for a weight that
    is quantized, sharded or shared by several adapters. The sum is formed, in x's dtype and anew in
    the backward pass, for a ``delta_a`` of half of the rows or more and 512 tokens or more; else
    the update's product is added to the output.

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
            memory as the weights do in float32. (Inductor merges the two formings and keeps the
            result, by reading of torch 2.13 and not run: 3.8 GB in bfloat16 for all rows at 8B.)

    Returns:
        ``[..., out_features]`` in x's dtype (under autocast, in the autocast dtype), differentiable
        in x, delta_a, delta_b and bias. The update's products are those of x's dtype.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    _, in_features = check_linear(x, weight, bias)
    if delta_a.ndim != 2:
        raise ValueError(f"delta_a must be [k, r]; it is {list(delta_a.shape)}.")
    rank = in_features if delta_b is None else delta_a.shape[1]
    check_shape("delta_a", delta_a, check_index(index), rank)
    check_shape("delta_b", delta_b, rank, in_features)
    if directions is not None and (directions.ndim != 2 or len(directions) != in_features):
        raise ValueError(f"directions must be [{in_features}, r]; it is {list(directions.shape)}.")
    many = len(index) >= _MANY * len(weight) and x.shape[:-1].numel() >= _TOKENS
    form = delta_b is None and many
    x, cast, bias = autocast(x, weight, bias)
    # the sum is rounded once, so it is that of the weight before autocast has rounded it
    weight = weight if form else cast
    return _RowDeltaLinear.apply(x, weight, delta_a, delta_b, index, bias, directions, form)


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
        form: bool,
    ) -> Tensor:
        keep(ctx, x, weight, delta_a, delta_b, index, directions)
        ctx.form = form
        delta_a, delta_b = acting_factors(delta_a, delta_b, directions)
        with without_autocast(x):
            if form:
                return dense_linear(x, _sum(weight, delta_a, index, x.dtype), bias)
            u = as_matrix(x)
            y = functional.linear(u, weight, bias)
            if delta_b is not None:
                u = u @ delta_b.to(x.dtype).t()
            added = u @ padded_rows(delta_a, x.dtype).t()
            return unviewed(add_columns(y, index, added[:, : len(index)]), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        x, weight, delta_a, delta_b, index, directions = kept(ctx)
        needs_x, _, needs_a, needs_b, _, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = grad_bias = None
        flat, upstream = as_matrix(x), as_matrix(grad)
        if ctx.form:
            if needs_a:
                selected = selected_columns(grad, index)
                grad_a = weight_gradient(selected, flat, delta_a.dtype)[: len(index)]
            if needs_x:
                acting, _ = acting_factors(delta_a, None, directions)
                grad_x = (upstream @ _sum(weight, acting, index, x.dtype)).view(x.shape)
        elif needs_x or needs_a or needs_b:
            delta_a, delta_b = acting_factors(delta_a, delta_b, directions)
            selected = selected_columns(grad, index)
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
                grad_x = (upstream @ weight).addmm_(left, right).view(x.shape)
        if needs_bias:
            grad_bias = upstream.sum(0)
        if delta_b is None and grad_a is not None:
            grad_a = leave_out(grad_a, directions)
        if grad_b is not None:
            grad_b = leave_out(grad_b, directions)
        return grad_x, None, grad_a, grad_b, None, grad_bias, None, None


def _sum(weight: Tensor, delta: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight with ``delta`` added to rows ``index`` of it, rounded once, to ``dtype``."""
    rows = rounded_sum(weight.index_select(0, index), delta, dtype)
    every = len(index) == len(weight)
    whole = torch.empty_like(weight, dtype=dtype) if every else weight.to(dtype, copy=True)
    return whole.index_copy_(0, index, rows)
