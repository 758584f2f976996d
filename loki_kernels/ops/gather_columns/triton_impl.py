"""A tile of rows by selected columns a program; with a sorted index, loads nearly coalesce."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._check import unsupported_dtype
from .._triton import DTYPES, Compilation
from . import aligned_rows

_CONFIG = triton.Config({"BLOCK_N": 16, "BLOCK_K": 128}, num_warps=4, num_stages=1)


def unsupported(x: Tensor, *_: object) -> str | None:
    return unsupported_dtype(x)


@triton.jit
def forward_kernel(
    x, index, out, x_row, x_column, out_row, rows, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.load(index + j, mask=j < k, other=0).to(tl.int64)
    mask = (n < rows)[:, None] & (j < k)[None, :]
    values = tl.load(x + n[:, None] * x_row + column[None, :] * x_column, mask=mask)
    tl.store(out + n[:, None] * out_row + j[None, :], values, mask=mask)


def forward(x: Tensor, index: Tensor) -> Tensor:
    out = aligned_rows(x, index)
    rows, k = out.shape
    if out.numel():
        tile = _CONFIG.kwargs
        grid = (triton.cdiv(rows, tile["BLOCK_N"]), triton.cdiv(k, tile["BLOCK_K"]))
        with torch.cuda.device_of(x):
            forward_kernel[grid](
                x,
                index.contiguous(),
                out,
                *x.stride(),
                out.stride(0),
                rows,
                k,
                **_CONFIG.all_kwargs(),
            )
    return out


def compilations() -> Iterator[Compilation]:
    for name in DTYPES.values():
        types = {"x": f"*{name}", "index": "*i64", "out": f"*{name}"}
        types |= dict.fromkeys(("x_row", "x_column", "out_row", "rows", "k"), "i32")
        yield Compilation(forward_kernel, types, {}, (_CONFIG,), name)
