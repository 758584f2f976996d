"""Dense products the linear ops share; cuBLAS and MKL do them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def as_matrix(x: Tensor) -> Tensor:
    """``[..., n]`` as ``[tokens, n]``."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` in an autograd function, whose result a model may change in place.

    With a bias ``F.linear`` gives a view of ``[tokens, out_features]``, which autograd lets nobody
    add to that is not its maker, as Falcon's layers do.
    """
    y = functional.linear(as_matrix(x), weight, bias)
    unviewed: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]])
    return unviewed


def selected_columns(grad: Tensor, index: Tensor) -> Tensor:
    """``dY[:, S]``, ``[tokens, k]``, each token's line starting at a multiple of 16 bytes.

    A tensor-core product cannot load unaligned lines by TMA or 16-byte copies, and k is seldom a
    multiple of 8: dW_S at 409 columns takes 459 us of an H200 without the padding, 151 with it.
    Gathering inside the product instead would read dY once for every tile of X's columns: at
    4,096 tokens, 14336 -> 4096 and tiles of 128, 112 times 33 MB against once (`NOTES.md`).
    """
    k, step = index.shape[0], 16 // grad.dtype.itemsize
    padded = functional.pad(index, (0, -k % step))  # column 0 again
    return as_matrix(grad).index_select(1, padded)[:, :k]


def weight_gradient(selected: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``selected.T @ x``, summed in float32 and rounded once, to ``dtype``."""
    if dtype.itemsize <= selected.dtype.itemsize:
        return (selected.t() @ x).to(dtype)
    if selected.is_cuda and dtype == torch.float32:
        return torch.mm(selected.t(), x, out_dtype=dtype)
    return selected.t().to(dtype) @ x.to(dtype)
