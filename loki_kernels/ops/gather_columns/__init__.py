"""The selected columns of a matrix, packed."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import check_index
from .._dispatch import Backend, check_backend, register


def gather_columns(x: Tensor, index: Tensor, *, backend: Backend | None = None) -> Tensor:
    """``x[:, index]``, contiguous: the operand of a row-masked weight gradient.

    Args:
        x: ``[N, M]``.
        index: ``[k]`` int64 in [0, M).
        backend: ``"torch"``, ``"triton"`` or ``"cuda"``; chosen by `loki_kernels.backends` if None.

    Returns:
        ``[N, k]`` in x's dtype; no gradient.

    Raises:
        ValueError: for shapes that do not fit, or an unknown backend.
        RuntimeError: if a backend asked for by name cannot run.
    """
    check_backend(backend)
    if x.ndim != 2:
        raise ValueError(f"x must be [N, M]; it is {list(x.shape)}.")
    check_index(index)
    return torch.ops.loki_kernels.gather_columns(x.detach(), index, backend)


register(
    "gather_columns",
    "(Tensor x, Tensor index) -> Tensor",
    lambda x, index: x.new_empty(x.shape[0], index.shape[0]),
)
