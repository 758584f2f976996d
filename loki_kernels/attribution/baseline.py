"""Baselines that are measured: what the nodes do on average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..default_device import made_on_cpu
from ..discovery import find_structure
from ..errors import check_choice
from ..options import Site
from ..progress import progress_bar
from .engine import short_prompt
from .plan import BatchLimits, check_lengths, rotary_border, windows
from .prefill import keep_site
from .probe import check_sums
from .prompts import WINDOW, tokenize_prompts
from .steering import borrowed, forget_lengths, hooking


@made_on_cpu
def mean_activations(
    model: nn.Module,
    prompts: Iterable[Any],
    *,
    tokenizer: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    site: Site = "down_proj",
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Tensor:
    """The mean value of every node over all tokens of some prompts.

    A baseline for `attribute`: ``attribute(model, prompts, baseline=mean_activations(model,
    texts))`` measures what a node does beyond its average.

    Args:
        model: as in `attribute`.
        prompts: as in `attribute`, but an answer that a chat ends with is read too.
        tokenizer: as in `attribute`.
        chat_template_kwargs: as in `attribute`.
        site: as in `attribute`.
        batch_size: prompts at a time; by default as many as fit 1,024 tokens on a CPU and 16,384 on
            a GPU.
        progress: as in `attribute`.

    Returns:
        float32 ``[L, D]`` on the CPU; zero in layers without an FFN.

    Raises:
        ValueError: for another ``site``, as `attribute` for prompts, and for images and sounds.
        UnsupportedModelError: if the model's layers are not known, or one does more with what its
            blocks give than add it up.
    """
    check_choice("site", site, get_args(Site))
    structure = find_structure(model)
    sums = torch.zeros(len(structure.layers), structure.width(site), dtype=torch.float64)
    sequences = tokenize_prompts(
        prompts, tokenizer, structure.vocab_size, chat_template_kwargs, whole=True
    )
    sequences = check_lengths(sequences, structure)
    border = rotary_border(structure.causal_lm)
    limits = BatchLimits.of(structure.device, batch_size, border=border)
    tokens = 0
    bar = progress_bar(None, "mean activations", progress, unit="prompt")

    planned = (
        part for window in windows(sequences, WINDOW) for part in window.batches(0, limits, 1)
    )
    with borrowed(structure), bar:
        for part in planned:
            batch = part.on(structure.device)
            if any(batch.media):
                raise ValueError(
                    "mean_activations reads text alone, and some prompts have images or sounds: "
                    "their places would be averaged as those of the tokens that stand for them."
                )
            if not tokens:
                check_sums(structure, short_prompt(part.sequences[0]).to(structure.device))
            kept: dict[int, Tensor] = {}
            forget_lengths(structure)
            with hooking(keep_site(structure, site, kept)):
                structure.run_decoder(input_ids=batch.input_ids)
            samples, longest = batch.input_ids.shape
            ours = torch.arange(longest, device=batch.lengths.device) < batch.lengths[:, None]
            for layer, x in kept.items():
                x = x.reshape(samples, longest, -1)
                sums[layer] += x[ours.to(x.device)].float().sum(0).cpu().double()
            tokens += int(batch.lengths.sum())
            bar.update(samples)
    return (sums / tokens).float()
