"""Products of tokens sorted by group with one matrix a group: the experts of a mixture."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import library as torch_library
from torch.nn import functional

from ._check import check_first_derivative, without_autocast
from ._directions import acting_factors, keep, kept, leave_out
from ._products import add_columns, capability, padded_rows, selected_columns


class Update(NamedTuple):
    """An update of the same rows of every group's matrix.

    Attributes:
        a: ``[E, k, in_features]`` of any floating dtype, or ``[E, k, r]`` beside b.
        rows: int64 ``[k]`` in [0, out_features), distinct.
        directions: orthonormal columns ``[E, in_features, d]`` that it leaves alone: what acts is
            ``a b (I - U U^T)``; or None.
        b: ``[E, r, in_features]`` of an update of low rank (LoKI*); or None.
    """

    a: Tensor
    rows: Tensor
    directions: Tensor | None = None
    b: Tensor | None = None


def grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, update: Update | None = None
) -> Tensor:
    """``x[t] @ (W[g] + scatter(index, update[g])).T`` of every token t, g being its group.

    The weight is frozen and never written, and neither it nor its gradient is ever formed anew:
    the update is a second grouped product whose results are added to the columns ``index``, and
    its gradient is ``[E, k, in_features]``. What acts of it is formed in either pass, not kept.
    `torch.nn.functional.grouped_mm` does the products where it can, else a loop over the groups
    that have tokens.

    Args:
        x: ``[tokens, in_features]``, sorted by group.
        weight: ``[E, out_features, in_features]``, of x's dtype and any strides.
        offsets: int32 ``[E]``, where each group ends; the last one is ``tokens``.
        update: or None.

    Returns:
        ``[tokens, out_features]`` in x's dtype, differentiable in x and the update's a and b.
    """
    y: Tensor = _GroupedLinear.apply(x, weight, offsets, *(update or (None, None, None, None)))
    return y


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        a: Tensor | None,
        index: Tensor | None,
        directions: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        # only the gradient of an update needs x
        keep(ctx, None if a is None else x, weight, offsets, a, b, index, directions)
        y = _products(x, weight.transpose(1, 2), offsets)
        if a is not None:
            assert index is not None
            acting = padded_rows(_formed(a, b, directions), x.dtype)
            delta = _products(x, acting.transpose(1, 2), offsets)
            y = add_columns(y, index, delta[:, : len(index)])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        x, weight, offsets, a, b, index, directions = kept(ctx)
        needs_x, _, _, needs_a, _, _, needs_b = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = _products(grad, weight, offsets) if needs_x else None
        grad_a = grad_b = None
        if a is not None and (needs_x or needs_a or needs_b):
            selected = selected_columns(grad, index)
            if grad_x is not None:
                acting = padded_rows(_formed(a, b, directions), grad.dtype)
                grad_x += _products(selected, acting, offsets)
            if needs_a or needs_b:
                outer = _outer_products(selected, x, offsets)
                outer = leave_out(outer[:, : len(index)].to(a.dtype), directions)
                with without_autocast(outer):
                    grad_a = outer if b is None else outer @ b.mT
                    grad_b = None if b is None else a.mT @ outer
        return grad_x, None, None, grad_a, None, None, grad_b


def _formed(a: Tensor, b: Tensor | None, directions: Tensor | None) -> Tensor:
    """What acts of an update, ``[E, k, in_features]``."""
    a, b = acting_factors(a, b, directions)
    with without_autocast(a):
        return a if b is None else a @ b


def _products(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """``x[t] @ M[g]``, ``[tokens, n]``, for x ``[tokens, m]`` and M ``[E, m, n]``."""
    if _why_loop(x, matrices) is None:
        return functional.grouped_mm(x, matrices, offs=offsets)
    y: Tensor = _loop_products(x, matrices, offsets)
    return y


def _outer_products(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """``a[group].T @ b[group]`` of every group, ``[E, m, n]``, for ``[tokens, m]``, ``[.., n]``."""
    if _why_loop(a, b) is None:
        product = functional.grouped_mm(a.t(), b, offs=offsets)
        # A sum over no tokens, which kernels leave as memory was on Blackwell (pytorch#172439) and
        # on ROCm (#174314): an optimizer would move those experts by it. Filled, not multiplied by
        # zero, since it may be NaN.
        empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0
        return product.masked_fill_(empty[:, None, None], 0.0)
    outer: Tensor = _loop_outer_products(a, b, offsets)
    return outer


def _why_loop(a: Tensor, b: Tensor) -> str | None:
    """Why torch's grouped product cannot take these; None if it can."""
    if a.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it does not take {a.dtype}"
    if torch.compiler.is_compiling() and a.dtype != torch.bfloat16:
        return "Inductor lowers it for bfloat16 alone"
    if not len(a):
        return "it does not take no tokens"
    compiling, step = torch.compiler.is_compiling(), 16 // a.dtype.itemsize
    for matrix in (a, b):
        line, element = sorted(matrix.stride()[-2:], reverse=True)
        if element != 1 or line % step or not (compiling or matrix.data_ptr() % 16 == 0):
            return "its lines begin at multiples of 16 bytes"
    if a.is_cuda:
        return None if capability(a.device) >= (8, 0) else "it needs compute capability 8.0"
    return None if a.device.type == "cpu" else f"it was not tried on {a.device.type}"


# They wait for the offsets, which no CUDA graph can record.
_WAITS = (torch.Tag.cudagraph_unsafe,)


@torch_library.custom_op("loki_kernels::grouped_products", mutates_args=(), tags=_WAITS)
def _loop_products(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    y = x.new_zeros(len(x), matrices.shape[2])
    start = 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(x[start:end], matrices[group], out=y[start:end])
            start = end
    return y


@_loop_products.register_fake
def _(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(len(x), matrices.shape[2])


@torch_library.custom_op("loki_kernels::grouped_outer_products", mutates_args=(), tags=_WAITS)
def _loop_outer_products(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    outer = a.new_zeros(len(offsets), a.shape[1], b.shape[1])
    start = 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(a[start:end].t(), b[start:end], out=outer[group])
            start = end
    return outer


@_loop_outer_products.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(len(offsets), a.shape[1], b.shape[1])
