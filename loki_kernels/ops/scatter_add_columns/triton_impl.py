"""A product of two tiles whose epilogue adds to the selected columns of y."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._check import unit_stride, unsupported_dtype
from .._triton import DTYPES, Compilation, dot, narrow, tuned


def unsupported(y: Tensor, *_: object) -> str | None:
    return unsupported_dtype(y)


@triton.jit(do_not_specialize=["size_class"])
def forward_kernel(
    y, index, u, v, y_token, y_column, u_token, v_row, tokens, k, rank, size_class,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        left = tl.load(
            u + t[:, None] * u_token + r[None, :],
            mask=(t < tokens)[:, None] & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            v + j[:, None] * v_row + r[None, :],
            mask=(j < k)[:, None] & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
        total += dot(left, tl.trans(right))
    column = tl.load(index + j, mask=j < k, other=0)
    target = y + t[:, None] * y_token + column[None, :] * y_column
    mask = (t < tokens)[:, None] & (j < k)[None, :]
    before = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, narrow(before + total, y.dtype.element_ty), mask=mask)


@functools.cache
def configs(itemsize: int) -> tuple[triton.Config, ...]:
    shapes = [(32, 32, 16, 4, 1)]
    if itemsize == 2:
        shapes = [(128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (64, 32, 64, 4, 3)]
    return tuple(
        triton.Config({"BLOCK_T": t, "BLOCK_K": k, "BLOCK_R": r}, num_warps=w, num_stages=s)
        for t, k, r, w, s in shapes
    )


def forward(y: Tensor, index: Tensor, u: Tensor, v: Tensor) -> None:
    tokens, rank = u.shape
    k = index.shape[0]
    if not (tokens and k and rank):
        return
    u, v = unit_stride(u), unit_stride(v)

    def grid(meta):
        return triton.cdiv(tokens, meta["BLOCK_T"]), triton.cdiv(k, meta["BLOCK_K"])

    # y is added to: every tuning run starts from what it was
    kernel = tuned(
        forward_kernel, configs(y.element_size()), ("rank", "size_class"), restored=("y",)
    )
    with torch.cuda.device_of(y):
        kernel[grid](
            y, index.contiguous(), u, v, *y.stride(), u.stride(0), v.stride(0), tokens, k, rank,
            (tokens > 1024) + (tokens > 8192),
        )  # fmt: skip


def compilations() -> Iterator[Compilation]:
    for dtype, name in DTYPES.items():
        types = dict.fromkeys(("y", "u", "v"), f"*{name}") | {"index": "*i64"}
        scalars = ("y_token", "y_column", "u_token", "v_row", "tokens", "k", "rank", "size_class")
        types |= dict.fromkeys(scalars, "i32")
        yield Compilation(
            forward_kernel,
            types,
            {},
            configs(dtype.itemsize),
            name,
            tensor_cores=dtype.itemsize == 2,
        )
