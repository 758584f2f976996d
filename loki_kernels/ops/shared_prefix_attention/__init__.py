"""Attention of many single-token points over one shared, frozen prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call import call
from .._check import check_shape
from .._dispatch import Backend, check_backend, register, register_autograd


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
    backend: Backend | None = None,
) -> Tensor:
    """Each point attends to its sample's prefix and to itself, never to another point.

    All points of a sample stand at the position right after its prefix.

    Args:
        q: ``[B, H, N, d]``.
        k: the points' own keys, ``[B, Hkv, N, d]``; ``H`` is a multiple of ``Hkv``.
        v: the points' own values, ``[B, Hkv, N, d]``.
        prefix_k: ``[B, Hkv, P, d]``, constant: it gets no gradient.
        prefix_v: ``[B, Hkv, P, d]``, constant.
        prefix_lengths: ``[B]`` integers, the valid prefix positions of each sample (default P).
        scale: factor on the scores, ``d ** -0.5`` by default.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        window: sliding window: the point and the ``window - 1`` positions before it.
        sinks: ``[H]`` logits added to the softmax's denominator alone, constant.
        backend: one of `BACKENDS`; None chooses (`loki_kernels.backends`).

    Returns:
        ``[B, H, N, d]`` in q's dtype; the softmax is computed in float32 (float64 for float64).
        Differentiable in q, k and v.

    Raises:
        ValueError: for shapes that do not fit together, or an unknown backend.
        RuntimeError: if a backend asked for by name cannot run.
    """
    check_backend(backend)
    for name, tensor in (("q", q), ("k", k), ("prefix_k", prefix_k)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions; it is {tuple(tensor.shape)}.")
    batch, heads, points, dim = q.shape
    kv_heads = k.shape[1]
    if k.shape != (batch, kv_heads, points, dim) or v.shape != k.shape:
        raise ValueError(
            f"k and v must be [B, Hkv, N, d] = [{batch}, Hkv, {points}, {dim}]; "
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
    out, _ = call(
        "shared_prefix_attention",
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        prefix_lengths,
        sinks,
        dim**-0.5 if scale is None else float(scale),
        None if softcap is None else float(softcap),
        window,
        backend,
    )
    return out


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)


def _fake_backward(
    _grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _sinks, ctx.scale, ctx.softcap, ctx.window, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    options = (ctx.scale, ctx.softcap, ctx.window, ctx.backend)
    grads = call("shared_prefix_attention_backward", grad, *ctx.saved_tensors, *options)
    return *grads, *[None] * 8


register(
    "shared_prefix_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? prefix_lengths, "
    "Tensor? sinks, float scale, float? softcap, SymInt? window) -> (Tensor, Tensor)",
    _fake_forward,
)
register(
    "shared_prefix_attention",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, "
    "Tensor? prefix_lengths, Tensor out, Tensor lse, float scale, float? softcap, SymInt? window) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_backward,
    step="backward",
)
register_autograd("shared_prefix_attention", _setup_context, _backward)
