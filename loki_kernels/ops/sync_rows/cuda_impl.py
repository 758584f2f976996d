"""``csrc/sync_rows.cu``: one launch for up to 48 layers, a block a row."""

from __future__ import annotations

from torch import Tensor

from ... import _native
from .._check import unit_stride, unsupported_dtype

_sync_rows = _native.define(
    "cuda",
    "sync_rows(Tensor(a!)[] weights, Tensor[] base, Tensor[] updates, Tensor[] indices) -> ()",
)


def unsupported(
    weights: list[Tensor], base: list[Tensor], updates: list[Tensor], _: list[Tensor]
) -> str | None:
    if any(weight.stride(-1) != 1 for weight in weights):
        return "its kernel takes weights whose rows are contiguous."
    return unsupported_dtype(*weights, *base, *updates)


def forward(
    weights: list[Tensor], base: list[Tensor], updates: list[Tensor], indices: list[Tensor]
) -> None:
    _sync_rows(
        weights,
        [unit_stride(own) for own in base],
        [unit_stride(update) for update in updates],
        [unit_stride(index) for index in indices],
    )
