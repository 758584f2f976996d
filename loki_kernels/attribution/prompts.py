"""Turns what a user calls prompts into checked token sequences."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import explained
from ..questions import Question, checked_options, refuse_table, template_options_of, text_of
from ..tokenizing import (
    as_its_template_reads,
    chat_template_of,
    from_string,
    tokenizer_in,
    writes_chats,
)

logger = logging.getLogger(__name__)

# Prompts of a stream that are held at a time: of 1,000 tokens each 32 MiB.
WINDOW = 4096

# What lies beside token ids in a mapping and is not for the model.
_BESIDE = frozenset(
    {
        "attention_mask",
        "id",
        "idx",
        "index",
        "input_ids",
        "label",
        "label_ids",
        "labels",
        "length",
        "num_items_in_batch",
        "offset_mapping",
        "position_ids",
        "special_tokens_mask",
    }
)


# Parts of the names that transformers' models give to what their processors make.
MEDIA = re.compile(
    "pixel|image|video|audio|feature|input_values|aspect_ratio|second_per|cross_attention_mask"
)


@dataclass(frozen=True)
class Tokens:
    """One prompt.

    Attributes:
        ids: int64 ``[T]``.
        media: what a processor made of its images or sounds, by the model's own names.
        answer: int64 ``[n]``, the tokens to attribute; None for the one that the model predicts.
        contrast: int64 ``[n]``, those whose attribution is subtracted.
    """

    ids: np.ndarray
    media: Mapping[str, Tensor] = field(default_factory=dict)
    answer: np.ndarray | None = None
    contrast: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def several(self) -> bool:
        """Whether an answer of several tokens is attributed."""
        return any(x is not None and len(x) > 1 for x in (self.answer, self.contrast))

    @property
    def plain(self) -> bool:
        """Whether it is text of which one token is attributed: what the staircase takes."""
        return not (self.media or self.several)

    def content(self) -> bytes:
        """What a hash of the prompt is made of."""
        parts = [f"{len(self.ids)} ".encode(), self.ids.tobytes()]
        for name, tensor in sorted(self.media.items()):
            parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            parts.append(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, ids in (("answer", self.answer), ("contrast", self.contrast)):
            if ids is not None:
                parts += [f"{name} {len(ids)} ".encode(), ids.tobytes()]
        return b"".join(parts)


_NO_CHAT = "chat_template_kwargs is given, but no prompt is a chat."


def tokenize_prompts(
    prompts: Iterable[Any],
    tokenizer: Any,
    vocab_size: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    whole: bool = False,
) -> Iterator[Tokens]:
    """Every prompt as its tokens, padding removed; one after the other.

    Args:
        prompts: strings, chat-message lists, questions, or mappings with ``input_ids`` (``[T]`` or
            ``[B, T]``) and optionally ``attention_mask`` and ``position_ids``, or else with
            ``messages``, ``prompt`` or ``text``; a chat's ``tools`` and ``chat_template_kwargs`` go
            to the template, in place of those that all chats are given. Token ids are taken as
            they are, and so are special tokens that a string or a template names. Other tensors
            beside the ``input_ids`` of one prompt are a processor's images or sounds, if one of
            them has a name such as ``pixel_values``; else they are passed over.
        tokenizer: needed for strings and messages, a transformers tokenizer or a processor with
            one; messages go through its chat template.
        vocab_size: ids must be below it.
        chat_template_kwargs: what the chat template takes, such as ``enable_thinking``.
        whole: whether chats are texts, of which nothing is left out. Else an answer that a chat
            ends with is, and the generation prompt stands in its place.

    Raises:
        ValueError: for no or empty prompts, ids out of range, a mask with holes or of another kind,
            positions that are not 0 to T - 1, a chat without a template or one that it refuses, or
            options for chats where there is none.
        TypeError: for anything that is not a prompt, or text without a tokenizer.
    """
    if isinstance(prompts, (str, Mapping)):
        raise TypeError("prompts must be a list or another iterable of prompts, not one prompt.")
    refuse_table("prompts", prompts)
    options = checked_options(chat_template_kwargs or {})
    i, chats = 0, False
    answered = first = 0
    for prompt in prompts:
        own = options
        if isinstance(prompt, Question):
            prompt = prompt.prompt(tokenizer)
        elif isinstance(prompt, Mapping) and "input_ids" not in prompt:
            text = text_of(prompt)
            if _is_chat(text):
                own = options | template_options_of(prompt, f"prompt {i}")
            prompt = prompt if text is None else text
        if isinstance(prompt, Mapping):
            sequences = _from_mapping(prompt, i)
        else:
            if _is_chat(prompt):
                chats = True
                if whole and any(map(_shows, prompt)):  # which a processor would fetch and open
                    raise ValueError(f"prompt {i} has images or sounds; texts alone are read here.")
                asked = prompt if whole or _ends_by(own) else _asked(prompt, i)
                if len(asked) < len(prompt):
                    first, answered = first if answered else i, answered + 1
                prompt = asked
            sequences = [_from_text(prompt, tokenizer, i, own)]
        for tokens in sequences:
            _check_tokens(tokens.ids, i, vocab_size)
            yield tokens
            i += 1
    if not i:
        raise ValueError("prompts is empty; there is nothing to attribute.")
    if answered:
        logger.warning(
            "%d of %d prompts are chats that end with an answer (number %d first), which is left "
            "out: without target= it is what the model answers that is attributed.",
            answered, i, first,
        )  # fmt: skip
    if options and not chats:
        if i > WINDOW:  # of a stream hours have been computed by now
            logger.warning(_NO_CHAT)
        else:
            raise ValueError(_NO_CHAT)


def text_ids(
    content: Any, where: str, tokenizer: Any = None, vocab_size: int = sys.maxsize
) -> Tensor:
    """What `tokenize_prompts` makes of a whole text, int64 ``[T]``; an error says which it was."""
    try:
        found = list(tokenize_prompts([content], tokenizer, vocab_size, whole=True))
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("prompt 0", where)) from error
    if len(found) > 1:
        raise ValueError(f"{where} is a batch of {len(found)} texts; give each by itself.")
    if found[0].media:
        raise ValueError(f"{where} has images or sounds; texts alone are read here.")
    return torch.from_numpy(found[0].ids)


def _check_tokens(tokens: np.ndarray, i: int, vocab_size: int) -> None:
    if tokens.size == 0:
        raise ValueError(f"prompt {i} is empty: it has no token.")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise ValueError(
            f"prompt {i} holds token id {bad}"
            + (f", outside the model's vocabulary of {vocab_size}." if bad >= 0 else ".")
        )


def _is_chat(prompt: Any) -> bool:
    return (
        not isinstance(prompt, str)
        and isinstance(prompt, Sequence)
        and all(isinstance(message, Mapping) for message in prompt)
    )


def _answers(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "assistant"


def _asked(chat: Sequence[Any], i: int) -> Sequence[Any]:
    """A chat without the answer that it ends with, as those of data sets for training do.

    After it the model would be asked what it says in a turn that follows on its own.
    """
    end = next((n for n in range(len(chat), 0, -1) if not _answers(chat[n - 1])), 0)
    if chat and not end:
        raise ValueError(f"prompt {i} is a chat of an answer alone, which nothing asks for.")
    return chat[:end]


def _ends_by(options: Mapping[str, Any]) -> bool:
    """Whether these options for the chat template say how a chat ends."""
    return "add_generation_prompt" in options or bool(options.get("continue_final_message"))


def _ending(chat: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options with which a turn is opened after a chat that waits for an answer."""
    if _ends_by(options):
        return options
    return {"add_generation_prompt": not _answers(chat[-1])} | options


def _from_text(prompt: Any, tokenizer: Any, i: int, options: dict[str, Any]) -> Tokens:
    is_chat = _is_chat(prompt)
    if is_chat and any(map(_shows, prompt)):
        return _from_processor(prompt, tokenizer, i, options)
    if not isinstance(prompt, str) and not is_chat:
        raise TypeError(
            f"prompt {i} is a {type(prompt).__name__}; give strings, chat-message lists, or "
            "mappings with input_ids."
        )
    if tokenizer is None:
        message = f"prompt {i} is text, so a tokenizer is needed: pass tokenizer=..."
        raise explained(TypeError(message))
    template, tokenizer = chat_template_of(tokenizer), tokenizer_in(tokenizer)
    if not callable(tokenizer):
        raise TypeError(
            f"prompt {i} is text, and tokenizer= is a {type(tokenizer).__name__}; pass a "
            "transformers tokenizer, or a processor that has one."
        )
    if isinstance(prompt, str):
        ids = from_string(prompt, tokenizer)
    elif not prompt:
        ids = []
    else:
        ids = _from_chat(prompt, tokenizer, template, i, options)
    return Tokens(np.asarray(ids, dtype=np.int64))


def _shows(message: Mapping[str, Any]) -> bool:
    """Whether a chat message has an image, a sound or a video in it."""
    content = message.get("content")
    return isinstance(content, Sequence) and any(
        isinstance(part, Mapping) and part.get("type", "text") != "text" for part in content
    )


def _from_processor(chat: Sequence[Any], processor: Any, i: int, options: dict[str, Any]) -> Tokens:
    """A chat with images or sounds, by the processor that reads them."""
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "apply_chat_template"):
        raise TypeError(
            f"prompt {i} has images or sounds, so tokenizer= must be the model's processor; it is "
            f"a {type(processor).__name__}."
        )
    options = _ending(chat, options)
    try:
        made = processor.apply_chat_template(
            as_its_template_reads(chat, processor),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **options,
        )
    except Exception as error:  # a file that cannot be read, roles out of order
        raise ValueError(
            f"prompt {i} is refused by the processor ({type(error).__name__}: {error})."
        ) from error
    (tokens,) = _from_mapping(made, i)
    return tokens


def _from_chat(
    chat: Sequence[Any], tokenizer: Any, template: Any, i: int, options: dict[str, Any]
) -> list[int]:
    options = _ending(chat, options)
    if getattr(tokenizer, "chat_template", None) is None and template is not None:
        options.setdefault("chat_template", template)  # the processor's
    if not writes_chats(tokenizer) and options.get("chat_template") is None:
        raise ValueError(
            f"prompt {i} is a chat, but the tokenizer has no chat template; give strings, or set "
            "tokenizer.chat_template."
        )
    chat = as_its_template_reads(chat, tokenizer, options.get("chat_template"))
    try:  # tokenized without special tokens: the template names those it wants
        ids: list[int] = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, **options
        )["input_ids"]
    except Exception as error:  # the template is a program: roles out of order, an unknown field
        raise ValueError(
            f"prompt {i} is refused by the chat template ({type(error).__name__}: {error})."
        ) from error
    return ids


def _from_mapping(batch: Mapping[str, Any], first: int) -> list[Tokens]:
    if "input_ids" not in batch:
        raise ValueError(
            f"batch at prompt {first} has no input_ids, and no messages, "
            f"prompt or text; it has {sorted(batch)}."
        )
    ids = _as_tensor(batch["input_ids"], "input_ids", first)
    ids = ids if ids.numel() else ids.to(torch.int64)  # an empty list becomes a float tensor
    if ids.is_floating_point() or ids.ndim not in (1, 2):
        raise ValueError(
            f"input_ids of prompt {first} must be integers [T] or [B, T]; "
            f"they are {ids.dtype} {tuple(ids.shape)}."
        )
    mask = _beside(batch, "attention_mask", ids, first)
    positions = _beside(batch, "position_ids", ids, first)
    ids = torch.atleast_2d(ids)
    sequences: list[Tokens] = []
    for row, tokens in enumerate(ids):
        i = first + row
        kept = torch.ones_like(tokens, dtype=torch.bool)
        if mask is not None:
            kept = _kept(mask[row], i)
        if positions is not None:
            _check_positions(positions[row][kept], i)
        sequences.append(Tokens(tokens[kept].to(torch.int64).numpy()))
    media = {
        name: value
        for name, given in batch.items()
        if name not in _BESIDE and (value := _as_media(name, given)) is not None
    }
    # Others alone are a text tokenizer's, of text alone a processor's, or a data set's own columns,
    # which ``with_format("torch")`` and a DataLoader make tensors of: an answer's number, a score.
    if not any(map(MEDIA.search, media)):
        return sequences
    if len(sequences) > 1:
        raise ValueError(
            f"prompts {first} to {first + len(sequences) - 1} come as one batch with "
            f"{', '.join(sorted(media))}; give each prompt with images or sounds by itself."
        )
    for name in filter(_is_of_tokens, media):
        of_tokens = torch.atleast_2d(media[name])
        media[name] = of_tokens[:, kept] if of_tokens.shape == ids.shape else of_tokens
    return [Tokens(sequences[0].ids, media)]


def _is_of_tokens(name: str) -> bool:
    """Which tokens are an image's: Gemma 3's and Qwen-VL's attention and positions go by it."""
    return name.endswith("token_type_ids")


def _as_media(name: str, value: Any) -> Tensor | None:
    """What a processor made of images or sounds; None for what lies beside it.

    Its arrays become lists in a data set of ``map(processor)``, or NumPy's.
    """
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, (list, np.ndarray)) and (MEDIA.search(name) or _is_of_tokens(name)):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            return torch.as_tensor(np.asarray(value))  # not of pictures, or of their paths
    return None


def _as_tensor(values: Any, name: str, first: int) -> Tensor:
    try:
        tensor: Tensor = torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} of prompt {first} is no tensor: {error}.") from error
    return tensor


def _beside(batch: Mapping[str, Any], name: str, ids: Tensor, first: int) -> Tensor | None:
    """What lies beside ``input_ids``, a number for each token, ``[B, T]``; None if nothing does."""
    if batch.get(name) is None:
        return None
    values = _as_tensor(batch[name], name, first)
    if name == "position_ids" and values.ndim == 2 and ids.ndim == 2 and len(values) == 1:
        values = values.expand(len(ids), -1)  # one for all
    if values.shape != ids.shape:
        raise ValueError(
            f"{name} {tuple(values.shape)} and input_ids {tuple(ids.shape)} of prompt {first} "
            "differ in shape; only one number for each token is understood."
        )
    return values.view(-1, values.shape[-1])


def _kept(mask: Tensor, i: int) -> Tensor:
    """Which tokens of a prompt are no padding, bool ``[T]``."""
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"the attention mask of prompt {i} holds {mask[(mask != 0) & (mask != 1)][0].item()}; "
            "1 is a token and 0 padding. Give each document of a packed prompt by itself."
        )
    where = mask.nonzero().flatten()
    if len(where) and int(where[-1] - where[0]) + 1 != len(where):
        raise ValueError(
            f"the attention mask of prompt {i} has holes; only padding on the left or the right is "
            "understood."
        )
    return mask != 0


def _check_positions(positions: Tensor, i: int) -> None:
    wrong = (positions != torch.arange(len(positions))).nonzero().flatten()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"the position_ids of prompt {i} do not count from 0 to {len(positions) - 1}: token "
            f"{at} has position {positions[at].item()}. Give each document of a packed prompt by "
            "itself."
        )
