"""The selected columns of a matrix, packed."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import check_index
from .._dispatch import Backend, check_backend, register


def gather_columns(x: Tensor, index: Tensor, *, backend: Backend | None = None) -> Tensor:
    """``x[:, index]``, packed: the operand of a row-masked weight gradient.

    Args:
        x: ``[N, M]``.
        index: ``[k]`` int64 in [0, M).
        backend: one of `BACKENDS`; None chooses (`loki_kernels.backends`).

    Returns:
        ``[N, k]`` in x's dtype, each row starting at a multiple of 16 bytes (``stride(0) >= k``):
        without that a tensor-core product cannot load it by TMA or 16-byte copies, and k is
        seldom a multiple of 8. No gradient.

    Raises:
        ValueError: for shapes that do not fit, or an unknown backend.
        RuntimeError: if a backend asked for by name cannot run.
    """
    check_backend(backend)
    if x.ndim != 2:
        raise ValueError(f"x must be [N, M]; it is {list(x.shape)}.")
    check_index(index)
    return torch.ops.loki_kernels.gather_columns(x.detach(), index, backend)


def aligned_rows(x: Tensor, index: Tensor) -> Tensor:
    """The uninitialised result."""
    k = index.shape[0]
    step = 16 // x.dtype.itemsize
    return x.new_empty(x.shape[0], -(-k // step) * step)[:, :k]


register(
    "gather_columns",
    "(Tensor x, Tensor index) -> Tensor",
    aligned_rows,
)
