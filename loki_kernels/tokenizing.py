"""What a tokenizer makes of texts and of chats, whichever library it is of."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .errors import explained


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer in a folder or of a hub's name; OSError where a folder has no file of one.

    Of a config alone transformers makes Gemma's, Qwen's and GPT-2's with special tokens only.
    """
    from transformers import AutoTokenizer

    folder = os.fspath(name)
    if os.path.isdir(folder) and not any(map(_OF_TOKENIZERS.search, os.listdir(folder))):
        raise OSError(f"the folder {folder} has no file of a tokenizer")
    # False, since by default a terminal is asked for 15 s whether its code may run
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


_OF_TOKENIZERS = re.compile("token|vocab|tekken|piece")


def find_tokenizer(model: nn.Module) -> Any:
    """The tokenizer of ``model.name_or_path``; ValueError where there is none."""
    name = getattr(model, "name_or_path", "")
    if name:
        try:
            return load_tokenizer(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no tokenizer was found under {name!r} ({error}); pass tokenizer=..., or save it "
                "there (tokenizer.save_pretrained), which is how LokiConfig finds it"
            ) from error
    message = "the model has no name to find its tokenizer by; pass tokenizer=..."
    raise explained(ValueError(message))


def tokenizer_in(tokenizer: Any) -> Any:
    """A processor's own tokenizer; anything else as it is."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    return getattr(tokenizer, "tokenizer", tokenizer)


def from_string(text: str, tokenizer: Any) -> list[int]:
    """The tokens of ``text`` after what the tokenizer puts in front of it, such as BOS.

    What it appends is left out: after an EOS of its own the next token is another document's, and
    would be attributed. What it puts in front is left out where the text begins with it, as one
    that a chat template has written.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # what else can be called adds nothing
        return list(tokenizer(text)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    added = before_every_text(tokenizer)
    return plain if not plain or plain[: len(added)] == added else added + plain


def before_every_text(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts there by itself; one that is not transformers' none."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return []
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []


def pieces(tokens: int, length: int, head: int) -> Iterator[slice]:
    """Parts of ``length`` tokens, all but the first of so many fewer as ``head``."""
    begins = [0, *range(length, tokens, length - head)] if tokens else []
    return map(slice, begins, [*begins[1:], tokens])


def writes_chats(tokenizer: Any) -> bool:
    """Whether it, or of a processor its tokenizer, makes tokens of chats.

    By a template, or as mistral-common's without one.
    """
    template, tokenizer = chat_template_of(tokenizer), tokenizer_in(tokenizer)
    own = getattr(type(tokenizer), "apply_chat_template", None)
    return template is not None or (
        isinstance(tokenizer, PreTrainedTokenizerBase)
        and own is not PreTrainedTokenizerBase.apply_chat_template
    )


def chat_template_of(tokenizer: Any) -> str | None:
    """The tokenizer's own, or of a processor whose tokenizer has none the processor's.

    Of several the one named default.
    """
    own = getattr(tokenizer_in(tokenizer), "chat_template", None)
    template = getattr(tokenizer, "chat_template", None) if own is None else own
    return template.get("default") if isinstance(template, dict) else template


def as_its_template_reads(
    chat: Sequence[Any], tokenizer: Any, template: Any = None
) -> Sequence[Any]:
    """A chat whose strings are typed, where the chat template reads nothing else.

    The templates of SmolVLM, Idefics and LLaVA go through a content's parts: through a string
    letter by letter, of which they find none, and render an empty message without an error.
    """
    template = template or getattr(tokenizer, "chat_template", None)
    if not _reads_parts_alone(tokenizer, str(template)):  # which is found out once
        return chat
    return [
        {**message, "content": _as_parts(message["content"])}
        if isinstance(message.get("content"), str)
        else message
        for message in chat
    ]


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


@functools.lru_cache(maxsize=8)
def _reads_parts_alone(tokenizer: Any, template: str) -> bool:
    mark = "0123456789"

    def shows(content: Any) -> bool:
        own = str(getattr(tokenizer, "chat_template", None))
        options = {} if template == own else {"chat_template": template}
        chat = [{"role": "user", "content": content}]
        try:
            return mark in tokenizer.apply_chat_template(chat, tokenize=False, **options)
        except Exception:  # a template is a program, which may want other messages
            return False

    return not shows(mark) and shows(_as_parts(mark))
