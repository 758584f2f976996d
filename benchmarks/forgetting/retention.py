"""General ability before and after: text, and four sets of questions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from loki_kernels.demo.evaluation import token_log_probabilities, windows_of
from loki_kernels.demo.training import Encoded

from ..records import read_lines
from . import metrics
from .precision import autocast

_CHOICE_SETS = {"arc_easy": "arc_easy", "piqa": "piqa", "hellaswag": "hellaswag_first2000"}
ACCURACIES = (*_CHOICE_SETS, "lambada")


@dataclass(frozen=True)
class Choices:
    """A question and its choices, as token ids."""

    context: list[int]
    choices: list[list[int]]


class Retention:
    """The sets, encoded once: ``records`` of each set of questions, ``windows`` of 512 tokens."""

    def __init__(self, data: Path, tokenizer: Any, records: int, windows: int) -> None:
        wikitext = (data / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")
        self.text = windows_of(wikitext, tokenizer, windows, 512)
        self.choices: dict[str, tuple[list[Choices], list[int]]] = {}
        for name, file in _CHOICE_SETS.items():
            questions = _first(data / "general" / f"{file}.jsonl", records)
            prefix = "" if name == "hellaswag" else "\nAnswer:"
            self.choices[name] = (
                [
                    Choices(
                        tokenizer(question["query"].rstrip() + prefix)["input_ids"],
                        [_continuation(tokenizer, choice) for choice in question["choices"]],
                    )
                    for question in questions
                ],
                [question["gold"] for question in questions],
            )
        self.lambada = [
            _encode(tokenizer, record["context"], record["continuation"])
            for record in _first(data / "general" / "lambada_first1500.jsonl", records)
        ]

    def perplexity(self, model: nn.Module) -> float:
        """On wikitext-2."""
        with autocast():
            log_p = [p for p, _ in token_log_probabilities(model, self.text, 1)]
        return metrics.perplexity(log_p)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity and the accuracies."""
        result = {"perplexity": self.perplexity(model)}
        with autocast():
            for name, (questions, gold) in self.choices.items():
                log_p = choice_log_probabilities(model, questions)
                result[name] = metrics.choice_accuracy(log_p, gold)
            words = token_log_probabilities(model, self.lambada, 8)
        result["lambada"] = metrics.exact_match([best for _, best in words])
        return result


def _first(path: Path, count: int) -> list[dict[str, Any]]:
    return list(itertools.islice(read_lines(path), count))


@torch.no_grad()
def choice_log_probabilities(
    model: nn.Module, questions: Sequence[Choices], length: int = 512
) -> list[list[Tensor]]:
    """Log-probabilities of every choice's tokens after its context.

    Sequences of up to ``length`` tokens hold several questions, each with all its choices, and none
    sees another. So a context is read once, not once a choice, and nothing is padded: 57,000
    tokens instead of 113,000 for the study's three sets.
    """
    device = next(model.parameters()).device
    results: list[list[Tensor]] = []
    for members in _sequences(questions, length):
        packed = [_pack(question) for question in members]
        starts = itertools.accumulate((len(p.ids) for p in packed), initial=0)
        predicting = [p.predicting + start for p, start in zip(packed, starts, strict=False)]
        logits = model(
            input_ids=torch.cat([p.ids for p in packed])[None].to(device),
            position_ids=torch.cat([p.positions for p in packed])[None].to(device),
            attention_mask=torch.block_diag(*(p.sees for p in packed))[None, None].to(device),
            use_cache=False,
            logits_to_keep=torch.cat(predicting).to(device),
        ).logits[0]
        choices = [choice for question in members for choice in question.choices]
        wanted = torch.tensor(list(itertools.chain(*choices)), device=device)
        log_p = -functional.cross_entropy(logits.float(), wanted, reduction="none").cpu()
        parts = iter(log_p.split([len(choice) for choice in choices]))
        results += [[next(parts) for _ in question.choices] for question in members]
    return results


def _sequences(questions: Sequence[Choices], length: int) -> Iterator[list[Choices]]:
    sequence: list[Choices] = []
    free = length
    for question in questions:
        size = len(question.context) + sum(map(len, question.choices))
        if sequence and size > free:
            yield sequence
            sequence, free = [], length
        sequence.append(question)
        free -= size
    yield sequence


class _Packed(NamedTuple):
    """A question and its choices, one after the other.

    ``sees`` is [query, key]; ``predicting`` the places whose logits predict the choices' tokens.
    """

    ids: Tensor
    positions: Tensor
    sees: Tensor
    predicting: Tensor


def _pack(question: Choices) -> _Packed:
    context = len(question.context)
    parts = [question.context, *question.choices]
    part = torch.cat([torch.full((len(ids),), n) for n, ids in enumerate(parts)])
    positions = torch.cat(
        [torch.arange(len(ids)) + (context if n else 0) for n, ids in enumerate(parts)]
    )
    # a choice's first token is predicted from the context, the others from the one before
    predicting = torch.arange(context, len(part)) - 1
    predicting[positions[context:] == context] = context - 1
    return _Packed(
        torch.tensor(list(itertools.chain(*parts))),
        positions,
        ((part[:, None] == part) | (part == 0)).tril(),
        predicting,
    )


def _encode(tokenizer: Any, context: str, continuation: str) -> Encoded:
    prompt = tokenizer(context)["input_ids"]
    ids = _continuation(tokenizer, continuation)
    return {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}


def _continuation(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]
