"""One program a block of points of one key/value head: all their query heads share a prefix tile.

The query heads of a key/value head and the points are packed into the lines of one tile, a point's
heads side by side and padded to a power of two, so that a prefix tile is read once for all of them
and a point's own key gradient is a sum over neighbouring lines.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._check import unit_stride, unsupported_dtype
from .._triton import DTYPES, Compilation, dot, empty, narrow, tanh, tuned

# A launch is tuned again when the packed points or the prefix change class; N grows by m a layer.
_TUNED_BY = ("point_class", "prefix_class", "GROUPS", "HEAD_DIM", "SOFTCAP", "WINDOW")

MAX_BATCH = 65535  # the third axis of a grid
# Compiled once for all values: nothing is addressed by them, and N takes many.
_UNSPECIALISED = ["points", "window", "point_class", "prefix_class"]


def unsupported(q: Tensor, k: Tensor, *_: object) -> str | None:
    if q.shape[0] > MAX_BATCH:
        return f"its kernel takes up to {MAX_BATCH} samples, not {q.shape[0]}."
    dim, groups = q.shape[-1], q.shape[1] // k.shape[1]
    reason = unsupported_dtype(q)
    if reason is None and not configs("backward", q.element_size(), dim, groups):
        reason = (
            f"no tile of its kernel holds {groups} query heads a key/value head of dimension {dim} "
            f"in {q.dtype}."
        )
    return reason


@triton.jit
def _places(base, batch_stride, head_stride, stride, batch, head, point, d):
    """Addresses of a tile ``[points, d]`` of a ``[batch, head, point, d]`` tensor."""
    return base + batch * batch_stride + head * head_stride + point[:, None] * stride + d[None, :]


@triton.jit
def _cap(scores, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        scores = softcap * tanh(scores / softcap)
    return scores


@triton.jit
def _own(
    q, k, v, q_batch, q_head, q_point, k_batch, k_head, k_point, v_batch, v_head, v_point,
    batch, kv_head, points, scale, softcap,
    GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of the tile's lines: head, whether there is one, its place in ``[B, H, N]``; d and what of
    ``[lines, d]`` there is; queries, own keys and values, and the scores of the own keys."""
    line = tl.arange(0, BLOCK_M)
    point = tl.program_id(0).to(tl.int64) * (BLOCK_M // GROUPS_PADDED) + line // GROUPS_PADDED
    group = line % GROUPS_PADDED
    head = kv_head * GROUPS + group
    valid = (point < points) & (group < GROUPS)
    place = (batch * tl.num_programs(1) * GROUPS + head) * points + point
    d = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (d < HEAD_DIM)[None, :]
    queries = _places(q, q_batch, q_head, q_point, batch, head[:, None], point, d)
    queries = tl.load(queries, mask, 0.0)
    own_k = tl.load(_places(k, k_batch, k_head, k_point, batch, kv_head, point, d), mask, 0.0)
    own_v = tl.load(_places(v, v_batch, v_head, v_point, batch, kv_head, point, d), mask, 0.0)
    own_k, own_v = own_k.to(tl.float32), own_v.to(tl.float32)
    own = _cap(tl.sum(queries.to(tl.float32) * own_k, 1) * scale, softcap, SOFTCAP)
    return head, valid, place, d, mask, queries, own_k, own_v, own


@triton.jit
def _prefix(
    base, batch_stride, head_stride, stride, batch, head, position, length, d,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """A tile ``[positions, d]`` of the prefix's keys or values."""
    inside = (position < length)[:, None] & (d < HEAD_DIM)[None, :]
    position = position.to(tl.int64)
    return tl.load(
        _places(base, batch_stride, head_stride, stride, batch, head, position, d), inside, 0.0
    )


@triton.jit
def _shown(position, length, window, WINDOW: tl.constexpr):
    """Whether a point at position ``length`` sees the prefix's ``position``."""
    shown = position < length
    if WINDOW:
        shown = shown & (length - position < window)
    return shown


@triton.jit
def _visible_from(length, window, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first prefix tile a point at position ``length`` sees."""
    if WINDOW:
        return tl.maximum(length - window + 1, 0) // BLOCK_N * BLOCK_N
    return length * 0


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_kernel(
    q, k, v, prefix_k, prefix_v, lengths, sinks, out, lse,
    q_batch, q_head, q_point, k_batch, k_head, k_point, v_batch, v_head, v_point,
    pk_batch, pk_head, pk_position, pv_batch, pv_head, pv_position,
    points, scale, softcap, window, point_class, prefix_class,
    GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    head, valid, place, d, mask, queries, _, own_v, own = _own(
        q, k, v, q_batch, q_head, q_point, k_batch, k_head, k_point, v_batch, v_head, v_point,
        batch, kv_head, points, scale, softcap,
        GROUPS, GROUPS_PADDED, HEAD_DIM, SOFTCAP, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    # The online softmax starts from the point's own key and the sink: never empty, never infinite.
    highest = own
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    if SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32)
        highest = tl.maximum(own, sink)
        total = tl.exp(own - highest) + tl.exp(sink - highest)
    mixed = own_v * tl.exp(own - highest)[:, None]

    length = tl.load(lengths + batch).to(tl.int32)
    for start in range(_visible_from(length, window, WINDOW, BLOCK_N), length, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        keys = _prefix(
            prefix_k, pk_batch, pk_head, pk_position, batch, kv_head, position, length, d, HEAD_DIM
        )  # fmt: skip
        scores = _cap(dot(queries, tl.trans(keys)) * scale, softcap, SOFTCAP)
        shown = _shown(position, length, window, WINDOW)
        scores = tl.where(shown[None, :], scores, float("-inf"))
        peak = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - peak[:, None])
        shrink = tl.exp(highest - peak)
        values = _prefix(
            prefix_v, pv_batch, pv_head, pv_position, batch, kv_head, position, length, d, HEAD_DIM
        )  # fmt: skip
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + dot(narrow(weights, values.dtype), values)
        highest = peak

    tl.store(
        out + place[:, None] * HEAD_DIM + d[None, :],
        narrow(mixed / total[:, None], out.dtype.element_ty),
        mask=mask,
    )
    tl.store(lse + place, highest + tl.log(total), mask=valid)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def backward_kernel(
    grad, q, k, v, prefix_k, prefix_v, lengths, out, lse, grad_q, grad_k, grad_v,
    q_batch, q_head, q_point, k_batch, k_head, k_point, v_batch, v_head, v_point,
    pk_batch, pk_head, pk_position, pv_batch, pv_head, pv_position,
    points, scale, softcap, window, point_class, prefix_class,
    GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    _, valid, place, d, mask, queries, own_k, own_v, own = _own(
        q, k, v, q_batch, q_head, q_point, k_batch, k_head, k_point, v_batch, v_head, v_point,
        batch, kv_head, points, scale, softcap,
        GROUPS, GROUPS_PADDED, HEAD_DIM, SOFTCAP, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    packed = place[:, None] * HEAD_DIM + d[None, :]
    upstream = tl.load(grad + packed, mask=mask, other=0.0)
    wide = upstream.to(tl.float32)
    outcome = tl.load(out + packed, mask=mask, other=0.0).to(tl.float32)
    normaliser = tl.load(lse + place, mask=valid, other=0.0)
    # d softmax: every score's gradient is its weight times (its own pull - the average pull)
    average = tl.sum(wide * outcome, 1)

    weight = tl.where(valid, tl.exp(own - normaliser), 0.0)
    slope = weight * (tl.sum(wide * own_v, 1) - average) * scale
    if SOFTCAP:
        slope = slope * (1 - (own / softcap) * (own / softcap))
    pull = slope[:, None] * own_k
    POINTS: tl.constexpr = BLOCK_M // GROUPS_PADDED
    by_point = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    target = (batch * tl.num_programs(1) + kv_head) * points + by_point
    target = target[:, None] * HEAD_DIM + d[None]
    by_point_mask = (by_point < points)[:, None] & (d < HEAD_DIM)[None, :]
    to_k = tl.reshape(slope[:, None] * queries.to(tl.float32), (POINTS, GROUPS_PADDED, BLOCK_D))
    tl.store(grad_k + target, narrow(tl.sum(to_k, 1), grad_k.dtype.element_ty), mask=by_point_mask)
    to_v = tl.reshape(weight[:, None] * wide, (POINTS, GROUPS_PADDED, BLOCK_D))
    tl.store(grad_v + target, narrow(tl.sum(to_v, 1), grad_v.dtype.element_ty), mask=by_point_mask)

    length = tl.load(lengths + batch).to(tl.int32)
    for start in range(_visible_from(length, window, WINDOW, BLOCK_N), length, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        keys = _prefix(
            prefix_k, pk_batch, pk_head, pk_position, batch, kv_head, position, length, d, HEAD_DIM
        )  # fmt: skip
        values = _prefix(
            prefix_v, pv_batch, pv_head, pv_position, batch, kv_head, position, length, d, HEAD_DIM
        )  # fmt: skip
        scores = _cap(dot(queries, tl.trans(keys)) * scale, softcap, SOFTCAP)
        shown = _shown(position, length, window, WINDOW)[None, :] & valid[:, None]
        weights = tl.where(shown, tl.exp(scores - normaliser[:, None]), 0.0)
        slopes = weights * (dot(upstream, tl.trans(values)) - average[:, None]) * scale
        if SOFTCAP:
            slopes = slopes * (1 - (scores / softcap) * (scores / softcap))
        pull += dot(narrow(slopes, keys.dtype), keys)
    tl.store(grad_q + packed, narrow(pull, grad_q.dtype.element_ty), mask=mask)


# (bytes a number, d padded) -> lines, prefix positions, warps, stages. None of them spills on
# sm_80, sm_90 or sm_100 (`benchmarks.ops.compile_triton`); from 64 lines on they are wgmma's on
# sm_90. Exact float32 products have no tensor cores and hold a whole d in registers: none fits for
# d = 256.
_SHAPES: dict[str, dict[tuple[int, int], list[tuple[int, int, int, int]]]] = {
    "forward": {
        (2, 64): [(64, 64, 4, 3), (128, 32, 8, 3), (16, 64, 4, 3)],
        (2, 128): [(128, 64, 8, 3), (64, 32, 4, 3), (16, 64, 4, 3)],
        (2, 256): [(64, 64, 8, 2), (64, 32, 8, 2)],
        (4, 64): [(16, 32, 8, 1), (32, 16, 8, 1)],
        (4, 128): [(16, 16, 8, 1)],
    },
    "backward": {
        (2, 64): [(64, 32, 4, 3), (128, 64, 8, 3), (16, 64, 4, 3)],
        (2, 128): [(64, 64, 8, 2), (16, 64, 4, 2)],
        (2, 256): [(32, 32, 8, 2)],
        (4, 64): [(16, 32, 8, 1), (32, 16, 8, 1)],
        (4, 128): [(16, 16, 8, 1)],
    },
}


@functools.cache
def configs(step: str, itemsize: int, dim: int, groups: int) -> tuple[triton.Config, ...]:
    """The tiles that hold ``groups`` query heads of a point; empty if none does."""
    padded = max(64, triton.next_power_of_2(dim))
    return tuple(
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in _SHAPES[step].get((itemsize, padded), [])
        if m >= groups
    )


# At every launch they cost 40 us of the host: triton rounds numbers in a wrapper that takes 9 us,
# and `tuned` hashes each config.
@functools.cache
def _constants(groups: int, dim: int, softcap: bool, window: bool) -> dict[str, int]:
    return {
        "GROUPS": groups,
        "GROUPS_PADDED": triton.next_power_of_2(groups),
        "HEAD_DIM": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "SOFTCAP": softcap,
        "WINDOW": window,
    }


@functools.cache
def _tuned(step: str, itemsize: int, dim: int, groups: int) -> Any:
    kernel = {"forward": forward_kernel, "backward": backward_kernel}[step]
    return tuned(kernel, configs(step, itemsize, dim, groups), _TUNED_BY)


def _launch(step, tensors, lengths, others, scale, softcap, window, **flags) -> None:
    q, prefix_k = tensors[0], tensors[3]
    batch, heads, points, dim = q.shape
    kv_heads, prefix = prefix_k.shape[1:3]
    groups = heads // kv_heads
    constants = _constants(groups, dim, softcap is not None, window is not None)
    if lengths is None:
        lengths = torch.full((batch,), prefix, dtype=torch.int32, device=q.device)
    lengths = lengths.to(q.device).contiguous()  # the kernels know no stride of it
    packed = points * constants["GROUPS_PADDED"]

    def grid(meta):
        return -(-packed // meta["BLOCK_M"]), kv_heads, batch

    with torch.cuda.device_of(q):
        _tuned(step, q.element_size(), dim, groups)[grid](
            *others(lengths),
            *(stride for x in tensors for stride in x.stride()[:3]),
            points,
            scale,
            1.0 if softcap is None else softcap,
            0 if window is None else window,
            (packed > 64) + (packed > 256),
            int(prefix > 512),
            **constants,
            **flags,
        )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    tensors = [unit_stride(x) for x in (q, k, v, prefix_k, prefix_v)]
    out = empty(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel():
        _launch(
            "forward",
            tensors,
            prefix_lengths,
            lambda lengths: (
                *tensors,
                lengths,
                q if sinks is None else sinks.contiguous(),
                out,
                lse,
            ),
            scale,
            softcap,
            window,
            SINKS=sinks is not None,
        )
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [unit_stride(x) for x in (q, k, v, prefix_k, prefix_v)]
    grad = grad.contiguous()
    grads = empty(q), empty(k), empty(v)
    if q.numel():
        _launch(
            "backward",
            tensors,
            prefix_lengths,
            lambda lengths: (grad, *tensors, lengths, out, lse, *grads),
            scale,
            softcap,
            window,
        )
    return grads


# (head dimension, query heads a key/value head)
_COMPILED = ((64, 4), (64, 7), (80, 4), (128, 1), (128, 4), (128, 16), (256, 4))


def compilations() -> Iterator[Compilation]:
    """Each step for every dtype and head dimension it takes, plain and with every option.

    4 query heads a key/value head (Llama-3.1-8B); at dimension 64 also 7 (Qwen2.5-0.5B), at 128
    also 1 (Llama-2) and 16.
    """
    strides = [f"{x}_{axis}" for x in ("q", "k", "v") for axis in ("batch", "head", "point")]
    strides += [f"{x}_{axis}" for x in ("pk", "pv") for axis in ("batch", "head", "position")]
    scalars = dict.fromkeys([*strides, "points", "window", "point_class", "prefix_class"], "i32")
    scalars |= {"scale": "fp32", "softcap": "fp32"}
    for dtype, name in DTYPES.items():
        data = f"*{name}"
        for step, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
            for dim, groups in _COMPILED:
                choices = configs(step, dtype.itemsize, dim, groups)
                for options in (False, True) if choices else ():
                    types = {n: data for n in kernel.arg_names if n not in scalars and n.islower()}
                    types |= {"lengths": "*i32", "lse": "*fp32"}
                    constants = dict(_constants(groups, dim, options, options))
                    if step == "forward":
                        constants["SINKS"] = options
                    yield Compilation(
                        kernel,
                        types | scalars,
                        constants,
                        choices,
                        name,
                        tensor_cores=dtype.itemsize == 2,
                    )
