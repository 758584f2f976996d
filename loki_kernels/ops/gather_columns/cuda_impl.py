"""``csrc/gather_columns.cu``: a thread packs 16 bytes of a row."""

from __future__ import annotations

from torch import Tensor

from ... import _native
from .._check import unit_stride, unsupported_dtype
from . import aligned_rows

_gather_columns = _native.define(
    "cuda", "gather_columns(Tensor x, Tensor index, Tensor(a!) out) -> ()"
)


def unsupported(x: Tensor, *_: object) -> str | None:
    return unsupported_dtype(x)


def forward(x: Tensor, index: Tensor) -> Tensor:
    out = aligned_rows(x, index)
    if out.numel():
        _gather_columns(x, unit_stride(index), out)
    return out
