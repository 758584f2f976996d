"""`shared_prefix_attention` of one layer: all path points of a batch over their prompts.

225 points a prompt are what Llama-3.1-8B's last layer has at m = 7; 113 are the mean over layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..measure import DEVICE, DTYPE
from .suite import Case, Work, normal

_HEADS = {"heads": 32, "kv_heads": 8, "dim": 128}
SHAPES = {
    "cuda": [
        {"samples": b, "points": r, "prefix": p, **_HEADS}
        for b, r, p in (
            (16, 225, 128), (72, 113, 128), (16, 225, 512), (8, 225, 2048), (4, 225, 8192),
        )
    ],
    "cpu": [{"samples": 2, "points": 105, "prefix": 128, "heads": 9, "kv_heads": 3, "dim": 64}],
    "dry": [{"samples": 2, "points": 3, "prefix": 5, "heads": 4, "kv_heads": 2, "dim": 16}],
}  # fmt: skip
# Prompts of several lengths are what needs a mask; each shape is a compilation of each peer.
PEER_SHAPES = {
    "cuda": [SHAPES["cuda"][i] | {"ragged": True} for i in (0, 3)],
    "cpu": [SHAPES["cpu"][0] | {"ragged": True}],
    "dry": [SHAPES["dry"][0] | {"ragged": True}],
}


def make_case(
    samples: int,
    points: int,
    prefix: int,
    heads: int,
    kv_heads: int,
    dim: int,
    ragged: bool = False,
) -> Case:
    """``ragged``: prefixes of half to all of the length, rather than all of one."""
    inputs = {
        "q": normal(samples, heads, points, dim),
        "k": normal(samples, kv_heads, points, dim),
        "v": normal(samples, kv_heads, points, dim),
        "prefix_k": normal(samples, kv_heads, prefix, dim),
        "prefix_v": normal(samples, kv_heads, prefix, dim),
    }
    positions = samples * prefix
    if ragged:
        lengths = torch.linspace(prefix // 2, prefix, samples, device=DEVICE).long()
        inputs["prefix_lengths"] = lengths
        positions = int(lengths.sum())
    flops = 4 * heads * points * (positions + samples) * dim
    q, own = inputs["q"].numel(), inputs["k"].numel()
    before = positions * kv_heads * dim
    # backward: q, out and both their gradients; k, v and theirs. The prefix has no gradient, so
    # three products stand against the forward pass's two: the scores again, dout v^T and dq.
    forward = Work(flops, DTYPE.itemsize * (2 * q + 2 * own + 2 * before))
    backward = Work(1.5 * flops, DTYPE.itemsize * (4 * q + 4 * own + 2 * before))
    return Case(inputs, forward, backward, ("q", "k", "v"))


def _flex(inputs: dict[str, Any], **kernel_options: Any) -> Callable[..., Tensor]:
    """FlexAttention with the prefix and the points in one sequence of keys, under a mask.

    Joining them is part of what is timed: the points' keys are new at every call.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, _, points, _ = inputs["q"].shape
    prefix, lengths = inputs["prefix_k"].shape[2], inputs["prefix_lengths"]

    def seen(sample: Tensor, head: Tensor, point: Tensor, position: Tensor) -> Tensor:
        return (position < lengths[sample]) | (position - prefix == point)

    mask = create_block_mask(seen, batch, None, points, prefix + points, device=DEVICE)
    run = _compiled(flex_attention)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_lengths: Tensor
    ) -> Tensor:
        keys, values = torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)
        options = kernel_options or None
        return run(q, keys, values, block_mask=mask, enable_gqa=True, kernel_options=options)

    return attend


def _flex_and_self(inputs: dict[str, Any]) -> Callable[..., Tensor]:
    """FlexAttention to the prefix alone, each point's own value weighed in: nothing is joined."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    batch, heads, points, dim = inputs["q"].shape
    prefix, lengths = inputs["prefix_k"].shape[2], inputs["prefix_lengths"]
    groups = heads // inputs["k"].shape[1]

    def seen(sample: Tensor, head: Tensor, point: Tensor, position: Tensor) -> Tensor:
        return position < lengths[sample]

    mask = create_block_mask(seen, batch, None, points, prefix, device=DEVICE)

    def both(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, mask: Any) -> Tensor:
        before, aside = flex_attention(
            q, keys, values, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True)
        )
        k, v = (x.repeat_interleave(groups, dim=1).float() for x in (k, v))
        own = (q.float() * k).sum(-1) * dim**-0.5
        share = torch.sigmoid(own - aside.lse)[..., None]  # of the softmax's weight
        return torch.lerp(before.float(), v, share).to(q.dtype)

    run = _compiled(both)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_lengths: Tensor
    ) -> Tensor:
        return run(q, k, v, prefix_k, prefix_v, mask)

    return attend


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """On a CPU FlexAttention has no backward pass, and without one it needs no compiler."""
    return torch.compile(function, dynamic=False) if DEVICE.type == "cuda" else function


PEERS = {
    "flex": _flex,
    "flex_and_self": _flex_and_self,
    "flex_flash": partial(_flex, BACKEND="FLASH"),
}
