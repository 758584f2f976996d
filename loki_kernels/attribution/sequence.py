"""The path on which every position of a layer's output is scaled (captum's).

No prefix is shared here, since earlier positions are scaled too, but two facts still save work.
Layers below l are the ordinary prompt's, so the m scaled copies join the batch at layer l. And by
causality the last token's node reaches the answer through its own column alone, so the score at the
last token needs a backward pass through one token a copy: first the copies run without gradients
and leave their keys and values, then the last tokens run over those as in the staircase.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnsupportedModelError
from ..structure import Structure
from .definitions import PathIntegral
from .path import path_points
from .prefill import Batch, Prefill, Prefix
from .steering import Attend, for_all, hook_layer_input, hook_site, like, steered


def scaled_prefixes(
    structure: Structure,
    batch: Batch,
    prefill: Prefill,
    integral: PathIntegral,
    layers: Sequence[int],
) -> Prefix:
    """Keys and values of the ordinary prompt and of every scaled copy of ``layers``.

    Returns:
        layer_idx -> K, V ``[B * S, Hkv, T, d]``, sample-major, S growing by m at each of
        ``layers``; copy 0 is unperturbed.
    """
    (samples, tokens), m = batch.input_ids.shape, len(integral.alphas)
    prefix: Prefix = {}

    def append_copies(hidden: Tensor) -> Tensor:
        copies = hidden.view(samples, -1, *hidden.shape[1:])  # [B, S, T, hidden_size]
        return torch.cat([copies, copies[:, :1].expand(-1, m, -1, -1)], dim=1).flatten(0, 1)

    def scale_copies(layer: int) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            copies = x.view(samples, -1, tokens, x.shape[-1])  # [B, S, T, D]
            z = copies[:, 0].flatten(0, 1)  # [B * T, D]
            start = None if prefill.start is None else prefill.start[layer].flatten(0, 1)
            path = path_points(z, integral.alphas, start).view(samples, -1, m, x.shape[-1])
            return like(torch.cat([copies[:, :-m], path.transpose(1, 2)], dim=1), x)

        return change

    site, nodes = integral.definition.site, structure.present()
    inputs = (hook_layer_input(structure.layers[i], append_copies) for i in layers)
    sites = (hook for i in layers for hook in hook_site(nodes[i], site, scale_copies(i)))
    with steered(structure, _capturing_attention(prefix, samples), itertools.chain(inputs, sites)):
        structure.run_decoder(input_ids=batch.input_ids, position_ids=batch.positions)
    return prefix


def _capturing_attention(prefix: Prefix, samples: int) -> Attend:
    """Ordinary attention that leaves each layer's keys and values in ``prefix``."""

    def of_all(x: Tensor, copies: int) -> Tensor:
        return for_all(x.view(samples, -1, *x.shape[1:]), copies, 1).flatten(0, 1)

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        window: int | None,  # the mask has it
        **options: Any,
    ) -> Tensor:
        copies = len(query) // samples
        key, value = of_all(key, copies), of_all(value, copies)
        prefix[module.layer_idx] = (key, value)  # type: ignore[index]
        return _causal_attention(query, key, value, mask, **options)

    return attend


def _causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Ordinary causal attention, with the two features SDPA lacks written out."""
    groups = query.shape[1] // key.shape[1]
    length = query.shape[2]
    if softcap is None and sinks is None:
        mask = None if mask is None else _shared_mask(mask)
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            scale=scale,
            enable_gqa=groups > 1,
        )
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    else:
        mask = _shared_mask(mask)
    scores = scores.masked_fill(~mask, float("-inf"))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if sinks is not None:
        sink = sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, length, 1)
        weights = torch.softmax(torch.cat([scores, sink], -1), -1, dtype=wide)[..., :-1]
    else:
        weights = torch.softmax(scores, -1, dtype=wide)
    return weights.to(value.dtype) @ value


def _shared_mask(mask: Tensor) -> Tensor:
    """``[1, ...]``: prompts are padded on the right, so that one mask serves all samples.

    It was made for B samples, and the copies that joined are more.

    Raises:
        UnsupportedModelError: for a model that makes a mask of its own for each sample.
    """
    if len(mask) > 1 and not mask.eq(mask[:1]).all():
        raise UnsupportedModelError(
            "the model masks each sample in a way of its own; the sequence path needs one mask."
        )
    return mask[:1]
