"""One ordinary forward pass over the prompts, and what an attribution keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnsupportedModelError
from ..structure import Structure, first_non_finite
from .steering import Attend, hook_layer, hook_site, running


@dataclass
class Batch:
    """Prompts, right-padded to the longest: causal attention keeps the padding out of the rest."""

    input_ids: Tensor  # [B, T]
    lengths: Tensor  # [B]

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device)[None]

    @property
    def last(self) -> Tensor:
        return self.lengths - 1

    def at_last(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` at each sample's last token."""
        return x[torch.arange(x.shape[0], device=x.device), self.last.to(x.device)]


@dataclass
class Prefill:
    """What the rows need from one ordinary forward pass over the prompts."""

    logits: Tensor  # [B, V], at the last token
    layer_inputs: list[Tensor]  # L of [B, hidden_size], at the last token
    prefix: dict[int, tuple[Tensor, Tensor]]  # layer_idx -> K, V [B, Hkv, T, d]
    site: list[Tensor]  # L of [B, T, D]; filled only when asked for


def _prefill_attention(
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
        # Padding is on the right, so a batch has one mask for all its samples.
        mask = None if mask is None else mask[:1]
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
        mask = mask[:1]
    scores = scores.masked_fill(~mask, float("-inf"))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if sinks is not None:
        sink = sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, length, 1)
        weights = torch.softmax(torch.cat([scores, sink], -1), -1, dtype=wide)[..., :-1]
    else:
        weights = torch.softmax(scores, -1, dtype=wide)
    return weights.to(value.dtype) @ value


def capturing_attention(prefix: dict[int, tuple[Tensor, Tensor]]) -> Attend:
    """Ordinary attention that leaves each layer's keys and values in ``prefix``."""

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
        prefix[module.layer_idx] = (key, value)
        return _prefill_attention(query, key, value, mask, **options)

    return attend


def run_prefill(
    structure: Structure, batch: Batch, site: str, *, keep_site: bool = False
) -> Prefill:
    """One ordinary forward pass; logits only at each sample's last token."""
    prefill = Prefill(torch.empty(0), [], {}, [])

    def keep_last(hidden: Tensor) -> Tensor:
        prefill.layer_inputs.append(batch.at_last(hidden))
        return hidden

    def keep(x: Tensor) -> Tensor:
        prefill.site.append(x)
        return x

    head = structure.causal_lm.get_output_embeddings()
    handles = [hook_layer(layer, keep_last) for layer in structure.layers]
    handles.append(
        head.register_forward_pre_hook(lambda _m, args: (batch.at_last(args[0])[:, None],))
    )
    if keep_site:
        handles += [hook_site(down.module, site, keep) for down in structure.down_projs]
    with running(structure, capturing_attention(prefill.prefix), handles):
        output = structure.causal_lm(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            use_cache=False,
        )
    prefill.logits = output.logits[:, 0]
    if len(prefill.layer_inputs) != len(structure.layers) or not prefill.prefix:
        raise UnsupportedModelError(
            f"{type(structure.causal_lm).__name__} does not run its attention through "
            "transformers' AttentionInterface, so its keys and values cannot be captured."
        )
    if torch.isnan(prefill.logits).any():
        name = first_non_finite(structure.causal_lm)
        raise ValueError(
            "the model's logits are NaN"
            + (f"; its parameter {name} is not finite." if name else " for these prompts.")
        )
    return prefill
