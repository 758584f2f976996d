"""The tokens that are attributed: what a user calls a target, beside each prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tokenizing import tokenizer_in
from .definitions import Definition
from .prompts import Tokens

# Of each prompt a token, or an answer: its tokens or its text.
Target = Sequence[int] | Sequence[Sequence[int]] | Sequence[str] | Tensor


def with_answers(
    sequences: Iterable[Tokens],
    target: Target | None,
    contrast: Target | None,
    tokenizer: Any,
    vocab_size: int,
) -> Iterator[Tokens]:
    """Every prompt with the tokens to attribute, and those that are subtracted.

    Raises:
        ValueError: for more or fewer targets than prompts, empty ones or ids out of range; the
            lists themselves are checked at once.
        TypeError: for text without a tokenizer.
    """
    if contrast is not None and target is None:
        raise ValueError("contrast= is subtracted from the target; give target= too.")
    answers = None if target is None else _answers(target, "target", tokenizer, vocab_size)
    others = None if contrast is None else _answers(contrast, "contrast", tokenizer, vocab_size)
    return _joined(sequences, answers, others)


def check_answers(tokens: Iterable[Tokens], definition: Definition) -> Iterator[Tokens]:
    """The same prompts.

    Raises:
        ValueError: for an answer of several tokens where the definition has no meaning for one.
    """
    for prompt in tokens:
        if prompt.several:
            if definition.objective == "logit":
                raise ValueError(
                    "an answer of several tokens has no logit; choose objective='log_probability' "
                    "(or 'probability')."
                )
            if definition.path == "sequence":
                raise ValueError(
                    "path='sequence' scales every token of the prompt, and says nothing of an "
                    "answer's own; answers of several tokens take path='last_token'."
                )
        yield prompt


def _joined(
    sequences: Iterable[Tokens],
    answers: list[np.ndarray] | None,
    contrasts: list[np.ndarray] | None,
) -> Iterator[Tokens]:
    count = 0
    given = [x for x in (answers, contrasts) if x is not None]
    for tokens in sequences:
        if any(count >= len(x) for x in given):
            raise ValueError(_why_not_one_each(min(map(len, given)), f"{count + 1} or more"))
        yield replace(
            tokens,
            answer=None if answers is None else answers[count],
            contrast=None if contrasts is None else contrasts[count],
        )
        count += 1
    if any(count < len(x) for x in given):
        raise ValueError(_why_not_one_each(max(map(len, given)), str(count)))


def _why_not_one_each(held: int, prompts: str) -> str:
    return (
        f"target must hold one token id for each of the {prompts} prompts, or one answer; it has "
        f"{held}."
    )


def _answers(target: Target, name: str, tokenizer: Any, vocab_size: int) -> list[np.ndarray]:
    if isinstance(target, str):
        raise TypeError(f"{name} must be a list with one answer for each prompt, not one text.")
    if not isinstance(target, Tensor) and any(isinstance(x, (str, Sequence)) for x in target):
        answers = [_answer(x, name, tokenizer) for x in target]
    else:
        ids = torch.as_tensor(target).cpu()
        if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"{name} must hold one token id for each prompt, or one answer, its tokens or its "
                f"text; it is {ids.dtype} {tuple(ids.shape)}."
            )
        answers = list(ids.to(torch.int64).numpy()[:, None])
    for i, answer in enumerate(answers):
        if not len(answer):
            raise ValueError(f"{name} {i} is empty: it has no token.")
        if answer.min() < 0 or answer.max() >= vocab_size:
            raise ValueError(f"{name} holds a token id outside the vocabulary of {vocab_size}.")
    return answers


def _answer(answer: Any, name: str, tokenizer: Any) -> np.ndarray:
    if isinstance(answer, str):
        tokenizer = tokenizer_in(tokenizer)
        if tokenizer is None:
            raise TypeError(f"{name} holds text, so a tokenizer is needed: pass tokenizer=...")
        answer = _as_continued(answer, tokenizer)
    elif not isinstance(answer, Sequence):
        answer = [answer]
    ids = np.asarray(answer)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"{name} holds {answer!r}, which is no list of token ids.")
    return ids.astype(np.int64)


def _as_continued(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text that goes on after others.

    Llama-2's tokenizer and those like it put a space before every text, which one that begins with
    a space has already: of " Paris" it makes the two tokens "▁" and "▁Paris". After a line break it
    puts none.
    """

    def tokens(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    alone, before, after = tokens(text), tokens("\n"), tokens("\n" + text)
    continued = after[len(before) :]
    if after[: len(before)] == before and len(alone) > 1 and alone[1:] == continued:
        return continued
    return alone
