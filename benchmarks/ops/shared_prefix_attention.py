"""`shared_prefix_attention` of one layer: all path points of a batch over their prompts.

225 points a prompt are what Llama-3.1-8B's last layer has at m = 7; 113 are the mean over layers.
"""

from __future__ import annotations

from ..measure import DTYPE
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


def make_case(samples: int, points: int, prefix: int, heads: int, kv_heads: int, dim: int) -> Case:
    inputs = {
        "q": normal(samples, heads, points, dim),
        "k": normal(samples, kv_heads, points, dim),
        "v": normal(samples, kv_heads, points, dim),
        "prefix_k": normal(samples, kv_heads, prefix, dim),
        "prefix_v": normal(samples, kv_heads, prefix, dim),
    }
    flops = 4 * samples * heads * points * (prefix + 1) * dim
    q, own, before = (inputs[name].numel() for name in ("q", "k", "prefix_k"))
    # backward: q, out and both their gradients; k, v and theirs
    forward = Work(flops, DTYPE.itemsize * (2 * q + 2 * own + 2 * before))
    backward = Work(2.5 * flops, DTYPE.itemsize * (4 * q + 4 * own + 2 * before))
    return Case(inputs, forward, backward, ("q", "k", "v"))
