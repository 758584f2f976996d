"""The path on which every position of a layer's output is scaled (captum's).

No prefix is shared here, since earlier positions are scaled too, but two facts still save work.
Layers below l are the ordinary prompt's, so the m scaled copies join the batch at layer l. And by
causality the last token's node reaches the answer through its own column alone, so the score at the
last token needs a backward pass through one token a copy: first the copies run without gradients
and leave their keys and values, then the last tokens run over those as in the staircase.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..structure import Structure
from .definitions import PathIntegral
from .path import path_points
from .prefill import Batch, Prefill, capturing_attention
from .steering import hook_layer_input, hook_site, steered


def scaled_prefixes(
    structure: Structure, batch: Batch, prefill: Prefill, integral: PathIntegral, layers: range
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of the ordinary prompt and of every scaled copy of ``layers``.

    Returns:
        layer_idx -> K, V ``[B * S, Hkv, T, d]``, sample-major, S growing by m at each of
        ``layers``; copy 0 is unperturbed.
    """
    samples, m = batch.input_ids.shape[0], len(integral.alphas)
    prefix: dict[int, tuple[Tensor, Tensor]] = {}

    def append_copies(hidden: Tensor) -> Tensor:
        copies = hidden.view(samples, -1, *hidden.shape[1:])  # [B, S, T, hidden_size]
        return torch.cat([copies, copies[:, :1].expand(-1, m, -1, -1)], dim=1).flatten(0, 1)

    def scale_copies(layer: int) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            copies = x.view(samples, -1, *x.shape[1:])  # [B, S, T, D]
            z = copies[:, 0].flatten(0, 1)  # [B * T, D]
            start = None if prefill.start is None else prefill.start[layer].flatten(0, 1)
            path = path_points(z, integral.alphas, start).view(samples, -1, m, x.shape[-1])
            return torch.cat([copies[:, :-m], path.transpose(1, 2)], dim=1).flatten(0, 1)

        return change

    site = integral.definition.site
    handles = [hook_layer_input(structure.layers[i], append_copies) for i in layers]
    handles += [hook_site(structure.down_projs[i].module, site, scale_copies(i)) for i in layers]
    with steered(structure, capturing_attention(prefix), handles):
        structure.decoder(input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False)
    return prefix
