"""A product added to the selected columns of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import check_index, check_shape
from .._dispatch import Backend, check_backend, register


def scatter_add_columns(
    y: Tensor, index: Tensor, u: Tensor, v: Tensor, *, backend: Backend | None = None
) -> Tensor:
    """``y[:, index] += u @ v.T``, in place.

    Triton's kernel sums the product in float32, stores none of it and rounds once, with y added.
    torch forms the product in y's dtype, ``[tokens, k]``, and adds it to y, which rounds again.

    Args:
        y: ``[tokens, M]``, changed.
        index: ``[k]`` int64 in [0, M), distinct.
        u: ``[tokens, r]`` in y's dtype.
        v: ``[k, r]`` in y's dtype.
        backend: one of `BACKENDS`; None chooses (`loki_kernels.backends`).

    Returns:
        ``y``; no gradient.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or an unknown backend.
        RuntimeError: if a backend asked for by name cannot run.
    """
    check_backend(backend)
    if y.ndim != 2 or u.ndim != 2:
        raise ValueError(
            f"y must be [tokens, M] and u [tokens, r]; they are {[*y.shape]} and {[*u.shape]}."
        )
    check_shape("u", u, y.shape[0], u.shape[1])
    check_shape("v", v, check_index(index), u.shape[1])
    if not y.dtype == u.dtype == v.dtype:
        raise ValueError(
            f"y, u and v must share a dtype; they are {y.dtype}, {u.dtype}, {v.dtype}."
        )
    with torch.no_grad():
        torch.ops.loki_kernels.scatter_add_columns(y, index, u, v, backend)
    return y


register(
    "scatter_add_columns",
    "(Tensor(a!) y, Tensor index, Tensor u, Tensor v) -> ()",
    lambda *_: None,
)
