"""One program a sample and layer finds its k-th smallest score by bisection over the bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._check import unit_stride, unsupported_dtype
from .._triton import DTYPES, Compilation

MAX_WIDTH = 32768  # keys one program holds in registers
TILE = 2048  # nodes taken at once


def unsupported(scores: Tensor, *_: object) -> str | None:
    if scores.shape[-1] > MAX_WIDTH:
        return f"its kernel takes up to {MAX_WIDTH} scores a layer, not {scores.shape[-1]}."
    return unsupported_dtype(scores)


@triton.jit
def _keys(scores, node, width, MAGNITUDE: tl.constexpr):
    """Unsigned integers in the scores' order; beyond ``width`` the largest there is."""
    mask = node < width
    value = tl.load(scores + node, mask=mask, other=0.0).to(tl.float32)
    if MAGNITUDE:
        value = tl.abs(value)
    value = tl.where(value == 0, 0.0, value)  # -0.0 ties with 0.0
    # A float's bits order like an integer once a negative one's are inverted and the sign bit of
    # the others is set.
    bits = value.to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)
    return tl.where(mask, key, 0xFFFFFFFF)


@triton.jit
def _is_nan(key):
    """Whether `_keys` made it of a NaN: beyond either infinity's."""
    return (key > 0xFF800000) | (key < 0x007FFFFF)


@triton.jit
def forward_kernel(
    scores, counts, scores_sample, scores_layer, counts_layer, counts_node, width, k,
    MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sample, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    scores += sample * scores_sample + layer * scores_layer
    counts += layer * counts_layer
    every = tl.arange(0, BLOCK)
    keys = _keys(scores, every, width, MAGNITUDE)
    # with a NaN nothing is taken; the public function refuses it before
    k = tl.where(tl.sum((_is_nan(keys) & (every < width)).to(tl.int32), 0) > 0, 0, k)

    # The k-th smallest key from its highest bit down: the largest that fewer than k are below.
    threshold = tl.cast(0, tl.uint32)
    bit = tl.cast(0x80000000, tl.uint32)
    for _ in range(32):
        trial = threshold | bit
        threshold = tl.where(tl.sum((keys < trial).to(tl.int32), 0) < k, trial, threshold)
        bit = bit >> 1
    wanted = k - tl.sum((keys < threshold).to(tl.int32), 0)

    # Tile by tile, reading the scores again: the ties' ranks and the addresses of a whole wide
    # layer beside its keys would spill.
    for start in range(0, width, TILE):
        node = start + tl.arange(0, TILE)
        key = _keys(scores, node, width, MAGNITUDE)
        equal = (key == threshold).to(tl.int32)
        taken = (key < threshold) | ((equal == 1) & (tl.cumsum(equal, 0) <= wanted))
        wanted -= tl.sum(equal, 0)
        target = counts + node.to(tl.int64) * counts_node
        one = tl.full((TILE,), 1, tl.int64)
        tl.atomic_add(target, one, mask=taken & (node < width), sem="relaxed")


def _config(block: int) -> triton.Config:
    warps = min(16, max(4, block // 1024))
    return triton.Config({"BLOCK": block, "TILE": min(block, TILE)}, num_warps=warps, num_stages=1)


def forward(scores: Tensor, k: int, counts: Tensor, magnitude: bool) -> None:
    samples, layers, width = scores.shape
    if not scores.numel():
        return
    scores = unit_stride(scores)
    with torch.cuda.device_of(scores):
        forward_kernel[samples, layers](
            scores,
            counts,
            *scores.stride()[:2],
            *counts.stride(),
            width,
            k,
            MAGNITUDE=magnitude,
            **_config(triton.next_power_of_2(width)).all_kwargs(),
        )


def compilations() -> Iterator[Compilation]:
    for name in DTYPES.values():
        types = {"scores": f"*{name}", "counts": "*i64"}
        scalars = ("scores_sample", "scores_layer", "counts_layer", "counts_node", "width", "k")
        types |= dict.fromkeys(scalars, "i32")
        for block in (4096, MAX_WIDTH):
            yield Compilation(forward_kernel, types, {"MAGNITUDE": True}, (_config(block),), name)
