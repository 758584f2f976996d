"""One program a sample and layer finds its k-th smallest score by bisection over the bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import DTYPES, Compilation, rows_last, unsupported_dtype

MAX_WIDTH = 16384  # 32 scores a thread; twice as many spill


def unsupported(scores: Tensor, *_: object) -> str | None:
    if scores.shape[-1] > MAX_WIDTH:
        return f"its kernel takes up to {MAX_WIDTH} scores a layer, not {scores.shape[-1]}."
    return unsupported_dtype(scores)


@triton.jit
def forward_kernel(
    scores, counts, scores_sample, scores_layer, counts_layer, counts_node, width, k,
    MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    node = tl.arange(0, BLOCK)
    mask = node < width
    place = scores + sample * scores_sample + layer * scores_layer + node
    value = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if MAGNITUDE:
        value = tl.abs(value)
    value = tl.where(value == 0, 0.0, value)  # -0.0 ties with 0.0
    # The bits of a float order like an integer once the negative ones are turned around.
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(mask, key, 0x7FFFFFFF)  # above every number and infinity: never among the k

    # the smallest threshold that at least k keys reach
    low, high = tl.cast(-0x80000000, tl.int32), tl.cast(0x7FFFFFFF, tl.int32)
    for _ in range(32):
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, where their sum overflows
        enough = tl.sum((key <= middle).to(tl.int32), 0) >= k
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    below = key < high
    equal = (key == high).to(tl.int32)
    wanted = k - tl.sum(below.to(tl.int32), 0)
    taken = below | ((equal == 1) & (tl.cumsum(equal, 0) <= wanted))
    target = counts + layer * counts_layer + node * counts_node
    tl.atomic_add(target, tl.full((BLOCK,), 1, tl.int64), mask=mask & taken)


def _config(block: int) -> triton.Config:
    return triton.Config({"BLOCK": block}, num_warps=min(16, max(4, block // 1024)), num_stages=1)


def forward(scores: Tensor, k: int, counts: Tensor, magnitude: bool) -> None:
    samples, layers, width = scores.shape
    if not scores.numel():
        return
    scores = rows_last(scores)
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
