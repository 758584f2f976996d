from __future__ import annotations

import torch
from torch import Tensor

from .._example import Draw, Example


def shared_prefix_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    batch, heads, points, dim = q.shape
    kv_heads, prefix = prefix_k.shape[1], prefix_k.shape[2]
    groups = heads // kv_heads
    scale = dim**-0.5 if scale is None else scale

    grouped = q.reshape(batch, kv_heads, groups, points, dim)  # [B, Hkv, G, N, d]
    packed = grouped.reshape(batch, kv_heads, groups * points, dim)
    to_prefix = (packed @ prefix_k.transpose(-1, -2)).view(batch, kv_heads, groups, points, prefix)
    to_self = (grouped * k.unsqueeze(2)).sum(-1, keepdim=True)
    scores = torch.cat([to_prefix, to_self], dim=-1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    if prefix_lengths is not None or window is not None:
        positions = torch.arange(prefix, device=q.device)
        lengths = (
            torch.full((batch,), prefix, device=q.device)
            if prefix_lengths is None
            else prefix_lengths.to(q.device)
        )[:, None]
        hidden = positions >= lengths  # [B, P]
        if window is not None:
            hidden = hidden | (lengths - positions >= window)  # the point stands at `length`
        hidden = torch.cat([hidden, hidden.new_zeros(batch, 1)], dim=-1)
        scores = scores.masked_fill(hidden[:, None, None, None, :], float("-inf"))

    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if sinks is not None:
        sink = sinks.view(1, kv_heads, groups, 1, 1).expand(batch, -1, -1, points, 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1, dtype=wide)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1, dtype=wide)
    weights = weights.to(v.dtype)
    own = weights[..., prefix:] * v.unsqueeze(2)
    shared = weights[..., :prefix].reshape(batch, kv_heads, groups * points, prefix) @ prefix_v
    return (shared.view(batch, kv_heads, groups, points, dim) + own).view(batch, heads, points, dim)


def example(draw: Draw) -> Example:
    inputs = {
        "q": draw.normal(2, 6, 5, 64),
        "k": draw.normal(2, 2, 5, 64),
        "v": draw.normal(2, 2, 5, 64),
        "prefix_k": draw.normal(2, 2, 70, 64),
        "prefix_v": draw.normal(2, 2, 70, 64),
        "prefix_lengths": torch.tensor([70, 33], device=draw.device),
    }
    return inputs, ("q", "k", "v")
