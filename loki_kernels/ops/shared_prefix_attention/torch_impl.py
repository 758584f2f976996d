"""The scores of prefix and own key are kept apart: nothing is concatenated, no weights saved."""

from __future__ import annotations

import torch
from torch import Tensor


def _scores(
    q: Tensor,
    k: Tensor,
    prefix_k: Tensor,
    prefix_lengths: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q as ``[B, Hkv, G, N, d]``, its scores of the prefix ``[B, Hkv, G * N, P]``, hidden ones
    -inf, and of the own key ``[B, Hkv, G * N, 1]``."""
    batch, kv_heads, points, dim = k.shape
    prefix = prefix_k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.reshape(batch, kv_heads, q.shape[1] // kv_heads, points, dim)
    shared = (grouped.flatten(2, 3) @ prefix_k.transpose(-1, -2)).to(wide).mul_(scale)
    own = (grouped.to(wide) * k.unsqueeze(2).to(wide)).sum(-1) * scale
    own = own.flatten(2, 3).unsqueeze(-1)
    if softcap is not None:
        shared = shared.div_(softcap).tanh_().mul_(softcap)
        own = softcap * torch.tanh(own / softcap)
    if prefix_lengths is not None or window is not None:
        positions = torch.arange(prefix, device=q.device)
        if prefix_lengths is None:
            prefix_lengths = torch.full((batch,), prefix, device=q.device)
        lengths = prefix_lengths.to(q.device)[:, None]
        hidden = positions >= lengths
        if window is not None:
            hidden = hidden | (lengths - positions >= window)  # the point stands at `length`
        shared = shared.masked_fill_(hidden[:, None, None, :], float("-inf"))
    return grouped, shared, own


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
    grouped, shared, own = _scores(q, k, prefix_k, prefix_lengths, scale, softcap, window)
    _, kv_heads, groups, points, _ = grouped.shape
    highest = torch.maximum(own, shared.amax(-1, keepdim=True)) if shared.shape[-1] else own
    if sinks is not None:
        sink = sinks.to(own.dtype).view(1, kv_heads, groups, 1).expand(-1, -1, -1, points)
        sink = sink.flatten(2, 3).unsqueeze(-1)
        highest = torch.maximum(highest, sink)
    shared = shared.sub_(highest).exp_()
    own = (own - highest).exp_()
    total = shared.sum(-1, keepdim=True) + own
    if sinks is not None:
        total = total + (sink - highest).exp()
    mixed = (shared.div_(total).to(v.dtype) @ prefix_v).view(grouped.shape)
    own = own.div_(total).to(v.dtype).view(*grouped.shape[:-1], 1)
    out = torch.addcmul(mixed, own, v.unsqueeze(2)).view(q.shape)
    return out, (highest + total.log()).view(q.shape[:3])


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
    grouped, shared, own = _scores(q, k, prefix_k, prefix_lengths, scale, softcap, window)
    shape, wide = grouped.shape, shared.dtype
    upstream = grad.reshape(shape)
    # d softmax: every score's gradient is its weight times (its own pull - the average pull)
    average = (grad.to(wide) * out.to(wide)).sum(-1).view(own.shape)
    normaliser = lse.view(own.shape)

    def slopes(scores: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
        weights = (scores - normaliser).exp_()
        slope = pull.sub_(average).mul_(weights).mul_(scale)
        if softcap is not None:
            # a hidden score is -inf, and its weight 0: keep 0 * inf out
            slope = slope * (1 - (scores / softcap).square()).clamp_min(0)
        return weights, slope

    _, slope = slopes(shared, (upstream.flatten(2, 3) @ prefix_v.transpose(-1, -2)).to(wide))
    upstream = upstream.to(wide)
    own_pull = (upstream * v.unsqueeze(2).to(wide)).sum(-1).view(own.shape)
    weight, own_slope = (x.view(*shape[:-1], 1) for x in slopes(own, own_pull))
    grad_q = (slope.to(q.dtype) @ prefix_k).view(shape) + (own_slope * k.unsqueeze(2)).to(q.dtype)
    grad_k = (own_slope * grouped).sum(2).to(k.dtype)
    grad_v = (weight * upstream).sum(2).to(v.dtype)
    return grad_q.view(q.shape), grad_k, grad_v
