"""``csrc/sync_rows.cu``: one launch for up to 64 layers, a block a row."""

from __future__ import annotations

from torch import Tensor

from ... import _native
from .._check import unit_stride, unsupported_dtype

_sync_rows = _native.define(
    "cuda", "sync_rows(Tensor(a!)[] weights, Tensor[] rows, Tensor[] indices) -> ()"
)


def unsupported(weights: list[Tensor], rows: list[Tensor], _: list[Tensor]) -> str | None:
    if any(weight.stride(-1) != 1 for weight in weights):
        return "its kernel takes weights whose rows are contiguous."
    return unsupported_dtype(*weights, *rows)


def forward(weights: list[Tensor], rows: list[Tensor], indices: list[Tensor]) -> None:
    _sync_rows(
        weights,
        [unit_stride(layer_rows) for layer_rows in rows],
        [unit_stride(index) for index in indices],
    )
