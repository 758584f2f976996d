"""Dense products the linear ops share; cuBLAS and MKL do them."""

from __future__ import annotations

import torch
from torch import Tensor

from .gather_columns import gather_columns


def as_matrix(x: Tensor) -> Tensor:
    """``[..., n]`` as ``[tokens, n]``."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def selected_columns(grad: Tensor, index: Tensor, backend: str | None) -> Tensor:
    """``dY[:, S]``, ``[tokens, k]``: a pass of its own.

    Gathering inside the product instead would read dY once for every tile of X's columns: at
    4,096 tokens, 14336 -> 4096 and tiles of 128, 112 times 33 MB against once (`NOTES.md`).
    """
    return gather_columns(as_matrix(grad), index, backend=backend)  # type: ignore[arg-type]


def weight_gradient(selected: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``selected.T @ x``, summed in float32 and rounded once, to ``dtype``."""
    if dtype.itemsize <= selected.dtype.itemsize:
        return (selected.t() @ x).to(dtype)
    if selected.is_cuda and dtype == torch.float32:
        return torch.mm(selected.t(), x, out_dtype=dtype)
    return selected.t().to(dtype) @ x.to(dtype)
