"""A gated activation feeding a row-masked linear layer, its product not kept."""

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
from .._dispatch import Backend, check_backend
from .._products import as_matrix, dense_linear, selected_columns, weight_gradient
from ..gated_product import Activation, check_gated


def swiglu_row_masked_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    rows: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "silu",
    backend: Backend | None = None,
) -> Tensor:
    """``row_masked_linear(gated_product(gate, up, activation), weight, rows, index, bias)``.

    Only gate and up are kept for the backward pass, which recomputes their product: two tensors of
    ``tokens * intermediate_size`` where the separate operations in eager mode keep four.

    Args:
        gate: ``[..., in_features]``.
        up: of gate's shape and dtype.
        weight: ``[out_features, in_features]``, merged; it gets no gradient.
        rows: ``[k, in_features]``, of any floating dtype; its gradient has its dtype. Its values
            are not read, so that it may as well be an update that the weight already holds.
        index: ``[k]`` int64 in [0, out_features), distinct, in any order.
        bias: ``[out_features]`` or None.
        activation: ``"silu"`` or ``"gelu_tanh"``.
        backend: of `gated_product`.

    Returns:
        ``[..., out_features]``, differentiable in gate, up, rows and bias. Under autocast, in the
        autocast dtype.

    Raises:
        ValueError: for shapes or dtypes that do not fit, an unknown activation or backend.
        RuntimeError: if a backend asked for by name cannot run.
    """
    check_backend(backend)
    check_gated(gate, up, activation)
    _, in_features = check_linear(gate, weight, bias)
    check_shape("rows", rows, check_index(index), in_features)
    gate, weight, bias = autocast(gate, weight, bias)
    return _SwigluRowMaskedLinear.apply(
        gate, up.to(gate.dtype), weight, rows, index, bias, activation, backend
    )


class _SwigluRowMaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight: Tensor,
        rows: Tensor,
        index: Tensor,
        bias: Tensor | None,
        activation: str,
        backend: str | None,
    ) -> Tensor:
        # `rows` is saved, though unused, so that autograd notices an optimizer step between the
        # forward and the backward pass.
        ctx.save_for_backward(gate, up, weight, rows, index)
        ctx.activation, ctx.backend = activation, backend
        with without_autocast(gate):
            product = torch.ops.loki_kernels.gated_product(gate, up, activation, backend)
            return dense_linear(product, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        gate, up, weight, rows, index = ctx.saved_tensors
        grad_gate = grad_up = grad_rows = grad_bias = None
        product: Any = None
        needs_gate, needs_up, _, needs_rows, _, needs_bias, *_ = ctx.needs_input_grad
        if needs_gate or needs_up:
            grad_gate, grad_up, product = torch.ops.loki_kernels.gated_product_backward(
                grad @ weight, gate, up, ctx.activation, ctx.backend
            )
        elif needs_rows:
            product = torch.ops.loki_kernels.gated_product(gate, up, ctx.activation, ctx.backend)
        if needs_rows:
            selected = selected_columns(grad, index)
            grad_rows = weight_gradient(selected, as_matrix(product), rows.dtype)[: len(index)]
        if needs_bias:
            grad_bias = as_matrix(grad).sum(0)
        return grad_gate, grad_up, None, grad_rows, None, grad_bias, None, None
