"""Turns what a user calls prompts into checked token sequences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Tokens = np.ndarray  # one prompt: int64 [T]


def tokenize_prompts(prompts: Iterable[Any], tokenizer: Any, vocab_size: int) -> list[Tokens]:
    """Every prompt as an int64 array of its tokens, padding removed.

    Args:
        prompts: strings, chat-message lists, or mappings with ``input_ids`` (``[T]`` or ``[B, T]``)
            and optionally ``attention_mask``.
        tokenizer: needed for strings and messages; messages go through its chat template with the
            generation prompt appended.
        vocab_size: ids must be below it.

    Raises:
        ValueError: for no or empty prompts, ids out of range, or a mask with holes.
        TypeError: for anything that is not a prompt, or text without a tokenizer.
    """
    if isinstance(prompts, (str, Mapping)):
        raise TypeError("prompts must be a list or another iterable of prompts, not one prompt.")
    sequences: list[Tokens] = []
    for prompt in prompts:
        if isinstance(prompt, Mapping):
            sequences += _from_mapping(prompt, len(sequences))
        else:
            sequences.append(_from_text(prompt, tokenizer, len(sequences)))
    if not sequences:
        raise ValueError("prompts is empty; there is nothing to attribute.")
    for i, tokens in enumerate(sequences):
        if tokens.size == 0:
            raise ValueError(f"prompt {i} is empty: it has no token.")
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            bad = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
            raise ValueError(
                f"prompt {i} holds token id {bad}, outside the model's vocabulary of {vocab_size}."
            )
    return sequences


def _from_text(prompt: Any, tokenizer: Any, i: int) -> Tokens:
    is_chat = isinstance(prompt, Sequence) and all(isinstance(m, Mapping) for m in prompt)
    if not isinstance(prompt, str) and not is_chat:
        raise TypeError(
            f"prompt {i} is a {type(prompt).__name__}; give strings, chat-message lists, or "
            "mappings with input_ids."
        )
    if tokenizer is None:
        raise TypeError("prompts are text, so a tokenizer is needed: pass tokenizer=...")
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif not prompt:
        ids = []
    elif getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"prompt {i} is a chat, but the tokenizer has no chat template.")
    else:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    return np.asarray(ids, dtype=np.int64)


def _from_mapping(batch: Mapping[str, Any], first: int) -> list[Tokens]:
    if "input_ids" not in batch:
        raise ValueError(f"batch at prompt {first} has no input_ids; it has {sorted(batch)}.")
    ids = torch.as_tensor(batch["input_ids"]).cpu()
    ids = ids if ids.numel() else ids.to(torch.int64)  # an empty list becomes a float tensor
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask).cpu()
    if ids.is_floating_point() or ids.ndim not in (1, 2):
        raise ValueError(
            f"input_ids of prompt {first} must be integers [T] or [B, T]; "
            f"they are {ids.dtype} {tuple(ids.shape)}."
        )
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} and input_ids {tuple(ids.shape)} of prompt "
            f"{first} differ in shape."
        )
    sequences: list[Tokens] = []
    for tokens, kept in zip(torch.atleast_2d(ids), torch.atleast_2d(mask) != 0, strict=True):
        where = kept.nonzero().flatten()
        if len(where) and int(where[-1] - where[0]) + 1 != len(where):
            raise ValueError(
                f"the attention mask of prompt {first + len(sequences)} has holes; only padding "
                "on the left or the right is understood."
            )
        sequences.append(tokens[kept].to(torch.int64).numpy())
    return sequences
