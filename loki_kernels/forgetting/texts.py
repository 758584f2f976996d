"""What the meter reads: texts with a domain, cut into chunks of tokens and put into batches."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attribution.prompts import MEDIA, text_ids
from ..questions import (
    Question,
    load_questions,
    records_of_file,
    refuse_table,
    template_options_of,
)
from ..tokenizing import before_every_text, pieces, tokenizer_in

_SUFFIXES = (".txt", ".jsonl")
UNKNOWN = -1  # the target of a text's last token
# Of a record with token ids, and images, which are refused; a data set has more columns.
_READ = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Text:
    """A string, a chat's record, a question or token ids; ``where`` is for errors."""

    content: str | Mapping[str, Any] | Question | Tensor
    domain: str
    where: str


@dataclass(frozen=True)
class Chunk:
    """At most ``length`` tokens of a text, read without those before them.

    One after a text's first begins again with what the tokenizer puts before every text (Gemma's,
    Llama's and GLM's models know no text without it).

    Attributes:
        text: the text's place in `Corpus.domains`.
        ids: int64 ``[T]``.
        first: how many of them are read and not measured, less than T.
        targets: int64 ``[T - first]``, the text's next tokens; `UNKNOWN` after its last one.
        start: the place of its first measured token among those of all chunks.
    """

    text: int
    ids: Tensor
    first: int
    targets: Tensor
    start: int


@dataclass(frozen=True)
class Batch:
    """Chunks, right-padded to the longest.

    Attributes:
        ids: int64 ``[B, T]``.
        mask: bool ``[B, T]``, false for padding.
        measured: bool ``[B, T]``.
        places: int64 ``[tokens]``, of the measured tokens among those of all chunks.
        targets: int64 ``[tokens]``.
    """

    ids: Tensor
    mask: Tensor
    measured: Tensor
    places: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Corpus:
    """The texts that are measured, in tokens.

    Attributes:
        domains: each text's.
        chunks: of all texts, in their order.
        left_out: how many texts the limit of tokens leaves out.
    """

    domains: list[str]
    chunks: list[Chunk]
    left_out: int

    def batches(self, tokens: int) -> list[Batch]:
        """Chunks of like length together, at most ``tokens`` with padding, or one chunk."""
        batches: list[Batch] = []
        members: list[Chunk] = []
        for chunk in sorted(self.chunks, key=lambda chunk: -len(chunk.ids)):
            if members and len(members[0].ids) * (len(members) + 1) > tokens:
                batches.append(_batch(members))
                members = []
            members.append(chunk)
        return [*batches, _batch(members)]


def check_ids(model: Any, corpus: Corpus) -> None:
    """Raise ValueError for a token that the model does not have, before it meets an embedding."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None)
    largest = max(int(chunk.ids.max()) for chunk in corpus.chunks)
    if isinstance(size, int) and largest >= size:
        raise ValueError(f"token id {largest} is outside the base's vocabulary of {size}.")


def _batch(chunks: Sequence[Chunk]) -> Batch:
    ids = torch.zeros(len(chunks), len(chunks[0].ids), dtype=torch.int64)
    mask, measured = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(2))
    for i, chunk in enumerate(chunks):
        ids[i, : len(chunk.ids)] = chunk.ids
        mask[i, : len(chunk.ids)] = True
        measured[i, chunk.first : len(chunk.ids)] = True
    places = [torch.arange(chunk.start, chunk.start + len(chunk.targets)) for chunk in chunks]
    targets = torch.cat([chunk.targets for chunk in chunks])
    return Batch(ids, mask, measured, torch.cat(places), targets)


def read_texts(texts: Any) -> list[Text]:
    """The texts that a user means; None means the bundled questions.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another suffix, damaged or empty, or a text is blank.
        TypeError: for what is no text.
    """
    refuse_table("texts", texts)
    if texts is None:
        return [Text(q, q.subject, q.subject) for q in load_questions()]
    if isinstance(texts, (str, os.PathLike)):
        found = _read_file(Path(texts))
    elif isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise TypeError("texts must be the name of a file, or a list of texts or of files.")
    else:
        found = []
        for i, record in enumerate(texts):
            if isinstance(record, os.PathLike) or _names_a_file(record):
                found += _read_file(Path(record))
            else:
                found.append(_as_text(record, "texts", f"text {i}"))
    if not found:
        raise ValueError(f"{texts if isinstance(texts, (str, Path)) else 'texts'} holds no text.")
    return found


def _names_a_file(record: Any) -> bool:
    """Whether one of a list of texts is no text, but where some are."""
    return isinstance(record, str) and record.endswith(_SUFFIXES) and os.path.isfile(record)


def _read_file(path: Path) -> list[Text]:
    if path.suffix == ".txt":
        try:
            content = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text.") from error
        paragraphs = re.split(r"\n[ \t]*\n", content)
        return [Text(p.strip(), path.stem, str(path)) for p in paragraphs if p.strip()]
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: texts are read from .txt or .jsonl, not {path.suffix!r}.")
    try:
        return [_as_text(record, path.stem, where) for where, record in records_of_file(path)]
    except TypeError as error:
        raise ValueError(str(error)) from error


def _as_text(record: Any, domain: str, where: str) -> Text:
    if isinstance(record, Question):
        return Text(record, record.subject or domain, where)
    content, beside = record, {}
    if isinstance(record, Mapping):
        if record.get("domain") is not None:
            domain = str(record["domain"])
        columns = ("text", "messages", "input_ids")  # of mixed records some are null
        column = next((name for name in columns if record.get(name) is not None), None)
        content = None if column is None else record[column]
        if column == "input_ids":
            read = {n: x for n, x in record.items() if n in _READ or MEDIA.search(n)}
            return Text(text_ids(read, where), domain, where)
        if column == "messages":  # with its tools among them
            beside = {"chat_template_kwargs": template_options_of(record, where)}
    if isinstance(content, str):
        if not content.strip():
            raise ValueError(f"{where} is blank.")
        return Text(content, domain, where)
    if isinstance(content, Sequence) and content and all(isinstance(m, Mapping) for m in content):
        return Text({"messages": content, **beside}, domain, where)
    raise TypeError(
        f"{where} is no text: give a string, a question, a chat's messages, or an object with "
        "text, messages or input_ids, and perhaps a domain."
    )


def tokenize(texts: Sequence[Text], tokenizer: Any, length: int, tokens: int | None) -> Corpus:
    """Cut texts into chunks, a text of each domain after the other, until there are ``tokens``.

    The last text that fits is cut off there, and one that alone would take more than its domain's
    part of them after that, or after ``length`` where this is more: the others are read too. What
    all chats begin with (the template's words, a system prompt) is not measured, since it would
    count once for each of them; nor is what all strings or all records of token ids begin with.

    Raises:
        ValueError: for a chat without a template, or no token at all.
        TypeError: for text without a tokenizer.
    """
    read: list[tuple[Text, Tensor]] = []
    total = 0
    most = None if tokens is None else max(length, tokens // len({t.domain for t in texts}))
    for text in _by_turns(texts):
        if tokens is not None and total >= tokens:
            break
        ids = encode(text, tokenizer)[:most]
        read.append((text, ids))
        total += len(ids)
    end = len(read[-1][1]) - max(0, total - (tokens or total))
    shared = {
        kind: _shared_start([ids for text, ids in read if _kind(text) == kind])
        for kind in {_kind(text) for text, _ in read}
    }
    start = torch.tensor(before_every_text(tokenizer_in(tokenizer)), dtype=torch.int64)
    domains: list[str] = []
    chunks: list[Chunk] = []
    place = 0
    for number, (text, ids) in enumerate(read, 1):
        targets = torch.cat([ids[1:], ids.new_full((1,), UNKNOWN)])
        skipped, stop = shared[_kind(text)], end if number == len(read) else len(ids)
        if skipped >= stop:  # the limit of tokens cut it off before anything of its own
            continue
        head = start if len(start) < length and torch.equal(ids[: len(start)], start) else start[:0]
        for part in pieces(stop, length, len(head)):
            if part.stop <= skipped:
                continue
            before = head if part.start else head[:0]
            piece, own = torch.cat([before, ids[part]]), max(0, skipped - part.start)
            first = len(before) + own
            chunks.append(Chunk(len(domains), piece, first, targets[part][own:], place))
            place += len(chunks[-1].targets)
        domains.append(text.domain)
    return Corpus(domains, chunks, len(texts) - len(domains))


def _kind(text: Text) -> type:
    return next((kind for kind in (str, Tensor) if isinstance(text.content, kind)), Mapping)


def _shared_start(texts: Sequence[Tensor]) -> int:
    """How many tokens all begin with; a part of the shortest, and none if all are one text."""
    if all(torch.equal(ids, texts[0]) for ids in texts):
        return 0
    length = min(map(len, texts)) - 1
    same = torch.stack([ids[:length] == texts[0][:length] for ids in texts]).all(0)
    return int(same.long().cumprod(0).sum())


def _by_turns(texts: Sequence[Text]) -> Iterator[Text]:
    """The first text of every domain, then the second of every domain, and so on."""
    turns: dict[str, int] = {}
    order: list[tuple[int, int]] = []
    for i, text in enumerate(texts):
        turns[text.domain] = turns.get(text.domain, -1) + 1
        order.append((turns[text.domain], i))
    return (texts[i] for _, i in sorted(order))


def encode(text: Text, tokenizer: Any) -> Tensor:
    """A text's token ids, int64 ``[T]``; ValueError or TypeError says which text it was."""
    if isinstance(text.content, Tensor):
        return text.content
    return text_ids(text.content, text.where, tokenizer)
