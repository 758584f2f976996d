"""Dense products the linear ops share; cuBLAS and MKL do them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from ._check import without_autocast


def as_matrix(x: Tensor) -> Tensor:
    """``[..., n]`` as ``[tokens, n]``."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` in an autograd function, whose result a model may change in place.

    With a bias ``F.linear`` gives a view of ``[tokens, out_features]``, which autograd lets nobody
    add to that is not its maker, as Falcon's layers do.
    """
    return unviewed(functional.linear(as_matrix(x), weight, bias), x)


def unviewed(y: Tensor, x: Tensor) -> Tensor:
    """``[tokens, n]`` as ``[..., n]`` with x's leading dimensions, which is no view to autograd."""
    result: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
    return result


def add_columns(y: Tensor, index: Tensor, added: Tensor) -> Tensor:
    """``[tokens, n]`` with ``added`` ``[tokens, k]`` added to columns ``index``, in y where it can.

    Compiled by torch 2.11 a result that was written in place has no gradient; and selective
    activation checkpointing keeps what ``mm`` gave, to which a layer that runs again would add
    once more.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return y.index_add(1, index, added)
    return y.index_add_(1, index, added)


# Products of k rows or columns are made with the next multiple of this: k is seldom one, and a
# tensor-core product whose lines or counts do not fit whole 16-byte copies falls back to slower
# ones. dW_S of 409 columns at 4,096 tokens, 14336 -> 4096 takes an H200 459 us as it is, 151 with
# padded lines alone, 81 as a product of 416 columns (`results/h200-ops.txt`). A CPU gains nothing
# and pays by count: an eighth of dW_S at 57 rows, which is 1 % of the layer.
STEP = 16


def selected_columns(grad: Tensor, index: Tensor) -> Tensor:
    """``dY[:, S]`` and column 0 of dY again for padding, ``[tokens, next multiple of 16 from k]``.

    Gathering inside a product instead would read dY once for every tile of X's columns: at 4,096
    tokens, 14336 -> 4096 and tiles of 128, 112 times 33 MB against once (`NOTES.md`).
    """
    padded = functional.pad(index, (0, -len(index) % STEP))
    return as_matrix(grad).index_select(1, padded)


def padded_rows(update: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., k, n]`` in another dtype, with rows of zeros up to the next multiple of 16."""
    missing = -update.shape[-2] % STEP
    return functional.pad(update.to(dtype), (0, 0, 0, missing)) if missing else update.to(dtype)


def rounded_sum(own: Tensor, update: Tensor, dtype: torch.dtype) -> Tensor:
    """``own + update``, made in float32 or wider and rounded once, to ``dtype``."""
    # 16 bits and 16 bits would be added in 16
    wide = update if update.element_size() > 2 else update.float()
    return torch.add(own, wide, out=torch.empty_like(own, dtype=dtype))


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU, asked for in every backward pass."""
    # dynamo, to which it is a constant, would warn of a function that keeps its results
    ask = torch.cuda.get_device_capability if torch.compiler.is_compiling() else _capability
    return ask(device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the GPU's library gives float32 products of it: cuBLAS of bfloat16 from Ampere on."""
    hip = torch.version.hip is not None
    return dtype != torch.bfloat16 or hip or capability(device) >= (8, 0)


def _sums_in_float32(dtype: torch.dtype) -> bool:
    """Whether cuBLAS may: float16 can be allowed to sum in float16, and then has no float32 out."""
    return dtype != torch.float16 or not torch.backends.cuda.matmul.allow_fp16_accumulation


def weight_gradient(selected: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``selected.T @ x``, summed in float32 and rounded once, to ``dtype``.

    Also where a backward pass runs inside autocast, which would round it to 16 bits.
    """
    with without_autocast(selected):
        if dtype.itemsize <= selected.dtype.itemsize:
            return (selected.t() @ x).to(dtype)
        own = selected.dtype
        wide = selected.is_cuda and dtype == torch.float32
        if wide and _sums_in_float32(own) and _widens(own, selected.device):
            return torch.mm(selected.t(), x, out_dtype=dtype)
        return selected.t().to(dtype) @ x.to(dtype)
