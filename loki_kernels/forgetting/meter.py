"""`drift`: how far a model has moved from its base."""

from __future__ import annotations

import contextlib
import gc
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..default_device import made_on_cpu
from ..errors import UnsupportedModelError
from ..inspection import dtype_named
from ..options import DEFAULT_LENGTH, DEFAULT_TOKENS
from ..training import Patch
from .measure import Moves, UnreadableHeadError, compare, compare_whole, record
from .models import (
    Model,
    check_pair,
    is_name,
    modules_of_adapter,
    name_of,
    open_model,
    tokenizer_of_pair,
    with_adapter,
    without_update,
)
from .result import Drift, summarize
from .texts import Corpus, read_texts, tokenize

logger = logging.getLogger(__name__)


@made_on_cpu
def drift(
    base: Model | Patch,
    tuned: Model | Patch | None = None,
    texts: Any = None,
    *,
    tokenizer: Any = None,
    length: int = DEFAULT_LENGTH,
    tokens: int | None = DEFAULT_TOKENS,
    dtype: str = "auto",
    device: str | None = None,
    progress: bool | None = None,
) -> Drift:
    """Measure how far ``tuned`` has moved from ``base``, whatever method made it.

    At every token of the texts: KL(base || tuned) of the next token's distributions in nats, and
    the log-probability of the text's next token in both, of logits in the models' dtype, from there
    on in float32 (of 16-bit models a KL below about .01 is rounding in part). The two models run
    one after the other; of the base its last hidden states stay on the host (``tokens`` x
    hidden_size, in their dtype) and its output head, which give its logits again chunk by chunk, so
    that two equal models have a KL of exactly 0. The base is dropped before ``tuned`` is loaded, if
    it was loaded here. Only where a model's logits need more than its head and its config's scale
    and soft-cap are both in memory at once.

    Args:
        base: folder or hub name of a causal language model; a model in memory, which stays on its
            device and is left as it is; or a `Patch`.
        tuned: the same, or an adapter's folder (this library's, or PEFT's of any method), which is
            put onto the base and taken off again. None compares a patched or PEFT's model with its
            own base.
        texts: ``.txt`` (a text a paragraph) or ``.jsonl`` (an object with ``text``, or ``messages``
            of a chat and perhaps its ``tools`` and ``chat_template_kwargs``, or ``input_ids``, and
            perhaps ``domain``); a list of such files, strings, chats, or such objects. None reads
            the bundled questions, their subjects as domains. What all chats, or all strings, begin
            with is read and not measured.
        tokenizer: of both; by default that of the models that are named.
        length: longer texts are read in chunks of so many tokens.
        tokens: how many are read, of all domains in turn, and of a text no more than its domain's
            part, or ``length``. None reads all.
        dtype: of models that are loaded: ``"auto"``, ``"float32"``, ...
        device: of models that are loaded; by default ``cuda`` where there is one.
        progress: show bars; None does on a terminal and in a notebook.

    Raises:
        ValueError: for models of two vocabularies, texts that are empty or damaged, logits that are
            NaN, or options out of range.
        TypeError: for text without a tokenizer, or what is no text.
        OSError: if a model or file is missing.
        UnsupportedModelError: if one model in memory is both and its head cannot be read alone.
    """
    check_positive(length=length, tokens=tokens)
    if dtype != "auto":
        dtype_named(dtype)  # before a model is read
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise ValueError(f"device {device} cannot be used: {error}") from error
    read = read_texts(texts)
    if isinstance(base, Patch):
        base = base.model
    if isinstance(tuned, Patch):
        tuned = tuned.model
    adapter = check_pair(base, tuned)
    tokenizer = tokenizer_of_pair(base, tuned, tokenizer)
    corpus = tokenize(read, tokenizer, length, tokens)
    moves = _measure(base, tuned, adapter, corpus, dtype, device, progress)
    if corpus.left_out:
        logger.info("%d of %d texts were left out (tokens=%s).", corpus.left_out, len(read), tokens)
    names = (name_of(base), name_of(base if tuned is None else tuned))
    return summarize(corpus, moves, names, tokenizer)


def check_positive(**options: int | None) -> None:
    """Raise ValueError for an option below 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be positive; it is {value}.")


def _measure(
    base: Model,
    tuned: Model | None,
    adapter: Path | None,
    corpus: Corpus,
    dtype: str,
    device: str | None,
    progress: bool | None,
) -> Moves:
    needed = set() if adapter is None else modules_of_adapter(tuned, adapter)
    model: nn.Module | None = open_model(base, dtype, device, needed)
    assert model is not None
    try:
        if tuned is None:
            with without_update(model):
                kept = record(model, corpus, progress=progress)
            return compare(kept, model, progress=progress)
        # an adapter's file may hold values of the head, whatever its config says
        kept = record(model, corpus, kept=adapter is not None, progress=progress)
        if adapter is not None:
            with with_adapter(model, tuned, adapter, keeps=not is_name(base)) as moved:
                return compare(kept, moved, progress=progress)
        own = getattr(model, "dtype", None)
        if is_name(base):
            model = None  # but for its head
            _free()
        second = open_model(tuned, dtype, device)
        if getattr(second, "dtype", None) != own:
            logger.warning(
                "the base is %s and the tuned model %s, whose rounding counts as drift too; dtype "
                "(--dtype) loads what is named in one.", own, getattr(second, "dtype", None),
            )  # fmt: skip
        return compare(kept, second, progress=progress)
    except UnreadableHeadError as error:
        logger.info("%s Both models run side by side.", error)
        if tuned is None or (adapter is not None and not is_name(base)):
            raise UnsupportedModelError(f"{error} Give two models.") from error
    with contextlib.ExitStack() as stack:
        first = open_model(base, dtype, device) if model is None else model
        second = open_model(tuned if adapter is None else base, dtype, device, needed)
        if adapter is not None:
            second = stack.enter_context(with_adapter(second, tuned, adapter, keeps=False))
        return compare_whole(first, second, corpus, progress=progress)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
