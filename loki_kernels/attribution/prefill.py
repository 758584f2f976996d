"""One ordinary forward pass over the prompts, and what an attribution keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedModelError
from ..structure import Structure, first_non_finite
from .definitions import Definition
from .steering import Attend, hook_layer_input, hook_site, steered


@dataclass(frozen=True)
class Batch:
    """Prompts, right-padded to the longest: causal attention keeps the padding out of the rest.

    Attributes:
        members: the prompts' places in the result.
        input_ids: int64 ``[B, T]``.
        lengths: int64 ``[B]``.
        target: int64 ``[B]``, the tokens to attribute; None for those that the model predicts.
    """

    members: list[int]
    input_ids: Tensor
    lengths: Tensor
    target: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device)[None]

    @property
    def last(self) -> Tensor:
        """``[B]``, the position of each sample's last token."""
        return self.lengths - 1

    def at_last(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` at each sample's last token."""
        return x[torch.arange(x.shape[0], device=x.device), self.last.to(x.device)]


@dataclass(frozen=True)
class Prefill:
    """What the path's points need from one ordinary forward pass.

    Attributes:
        logits: ``[B, V]``, at the last token.
        target: int64 ``[B]``, the tokens to attribute.
        layer_inputs: L of ``[B, hidden_size]``, at the last token.
        prefix: layer_idx -> keys and values ``[B, Hkv, T, d]``.
        start: L of ``[B, T, D]``, where the path starts at every position; None for zero.
    """

    logits: Tensor
    target: Tensor
    layer_inputs: list[Tensor]
    prefix: dict[int, tuple[Tensor, Tensor]]
    start: list[Tensor] | None


def run_prefill(structure: Structure, batch: Batch, definition: Definition) -> Prefill:
    """The ordinary forward pass, and the baseline's where the definition has one.

    Raises:
        UnsupportedModelError: if the attention's keys and values cannot be captured.
        ValueError: if the logits are NaN.
    """
    start: list[Tensor] | None = None
    if definition.baseline == "token_zero":
        start = []
        blank = torch.zeros_like(batch.input_ids)
        _forward(structure, batch, blank, {}, _keep_site(structure, definition.site, start))
    layer_inputs: list[Tensor] = []
    prefix: dict[int, tuple[Tensor, Tensor]] = {}

    def keep_last(hidden: Tensor) -> Tensor:
        layer_inputs.append(batch.at_last(hidden))
        return hidden

    handles = [hook_layer_input(layer, keep_last) for layer in structure.layers]
    logits = _forward(structure, batch, batch.input_ids, prefix, handles)
    if len(layer_inputs) != len(structure.layers) or not prefix:
        raise UnsupportedModelError(
            f"{type(structure.causal_lm).__name__} does not run its attention through "
            "transformers' AttentionInterface, so its keys and values cannot be captured."
        )
    if torch.isnan(logits).any():
        name = first_non_finite(structure.causal_lm)
        raise ValueError(
            "the model's logits are NaN"
            + (f"; its parameter {name} is not finite." if name else " for these prompts.")
        )
    target = logits.argmax(-1) if batch.target is None else batch.target.to(logits.device)
    return Prefill(logits, target, layer_inputs, prefix, start)


def _keep_site(structure: Structure, site: str, kept: list[Tensor]) -> list[RemovableHandle]:
    """Hooks that leave every layer's attributed activation in ``kept``."""

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    return [hook_site(down_proj.module, site, keep) for down_proj in structure.down_projs]


def _forward(
    structure: Structure,
    batch: Batch,
    input_ids: Tensor,
    prefix: dict[int, tuple[Tensor, Tensor]],
    handles: list[RemovableHandle],
) -> Tensor:
    """Logits ``[B, V]`` at each sample's last token; keys and values go into ``prefix``."""
    head = structure.causal_lm.get_output_embeddings()
    last_only = head.register_forward_pre_hook(lambda _m, args: (batch.at_last(args[0])[:, None],))
    with steered(structure, capturing_attention(prefix), [*handles, last_only]):
        output = structure.causal_lm(
            input_ids=input_ids, position_ids=batch.positions, use_cache=False
        )
    logits: Tensor = output.logits[:, 0]
    return logits


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
