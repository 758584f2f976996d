"""Attention of many single-token rows over one shared, frozen prefix."""

from __future__ import annotations

from torch import Tensor

from .._check import check_shape
from .reference import shared_prefix_attention_reference


def shared_prefix_attention(
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
    """Each row attends to its sample's prefix and to itself, never to another row.

    All rows of a sample stand at the position right after its prefix.

    Args:
        q: ``[B, H, R, d]``.
        k: the rows' own keys, ``[B, Hkv, R, d]``; ``H`` is a multiple of ``Hkv``.
        v: the rows' own values, ``[B, Hkv, R, d]``.
        prefix_k: ``[B, Hkv, P, d]``, constant: it gets no gradient.
        prefix_v: ``[B, Hkv, P, d]``, constant.
        prefix_lengths: ``[B]`` integers, the valid prefix positions of each sample (default P).
        scale: factor on the scores, ``d ** -0.5`` by default.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        window: sliding window: the row and the ``window - 1`` positions before it.
        sinks: ``[H]`` logits added to the softmax's denominator alone.

    Returns:
        ``[B, H, R, d]`` in q's dtype; the softmax is computed in float32 (float64 for float64).

    Raises:
        ValueError: for shapes that do not fit together.
    """
    batch, heads, rows, dim = q.shape
    kv_heads = k.shape[1]
    if k.shape != (batch, kv_heads, rows, dim) or v.shape != k.shape:
        raise ValueError(
            f"k and v must be [B, Hkv, R, d] = [{batch}, Hkv, {rows}, {dim}]; "
            f"they are {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key/value heads.")
    expected = (batch, kv_heads, prefix_k.shape[2], dim)
    if prefix_k.shape != expected or prefix_v.shape != expected:
        raise ValueError(
            f"prefix_k and prefix_v must be [B, Hkv, P, d] = {expected}; "
            f"they are {tuple(prefix_k.shape)} and {tuple(prefix_v.shape)}."
        )
    check_shape("prefix_lengths", prefix_lengths, batch)
    check_shape("sinks", sinks, heads)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1; it is {window}.")
    return shared_prefix_attention_reference(
        q,
        k,
        v,
        prefix_k.detach(),
        prefix_v.detach(),
        prefix_lengths,
        scale=scale,
        softcap=softcap,
        window=window,
        sinks=sinks,
    )
