"""``csrc/count_lowest.cu``: radix select in shared memory, one block a sample and layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _native
from .._check import unit_stride, unsupported_dtype

_count_lowest = _native.define(
    "cuda", "count_lowest(Tensor scores, int k, Tensor(a!) counts, bool magnitude) -> ()"
)
MAX_WIDTH = 32768


def unsupported(scores: Tensor, *_: object) -> str | None:
    width, limit = scores.shape[-1], MAX_WIDTH
    if scores.is_cuda:
        # 4 bytes a key and 9 KiB of counters; an A100's block has 163 KiB, smaller chips' 99
        properties: Any = torch.cuda.get_device_properties(scores.device)
        limit = min(limit, (properties.shared_memory_per_block_optin - 9 * 1024) // 4)
    if width > limit:
        return f"its kernel takes up to {limit} scores a layer, not {width}."
    return unsupported_dtype(scores)


def forward(scores: Tensor, k: int, counts: Tensor, magnitude: bool) -> None:
    if scores.numel():
        _count_lowest(unit_stride(scores), k, counts, magnitude)
