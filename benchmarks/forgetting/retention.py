"""General ability before and after: text, and four sets of questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from loki_kernels.demo.evaluation import token_log_probabilities
from loki_kernels.demo.training import Encoded

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
    """The sets, encoded once: ``rows`` of each set of questions, ``windows`` of 512 tokens."""

    def __init__(self, data: Path, tokenizer: Any, rows: int, windows: int) -> None:
        self.text = _text(data / "text" / "wikitext2_valid.txt", tokenizer, windows)
        self.choices: dict[str, tuple[list[Choices], list[int]]] = {}
        for name, file in _CHOICE_SETS.items():
            questions = _first(data / "general" / f"{file}.jsonl", rows)
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
            _encode(tokenizer, row["context"], row["continuation"])
            for row in _first(data / "general" / "lambada_first1500.jsonl", rows)
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
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


@torch.no_grad()
def choice_log_probabilities(
    model: nn.Module, questions: Sequence[Choices], batch_size: int = 8
) -> list[list[Tensor]]:
    """Log-probabilities of every choice's tokens after its context.

    All choices of a question share one row, in which none sees another: a question's tokens are
    read once, not once a choice (114,000 tokens instead of 205,000 for the study's sets).
    """
    results: dict[int, list[Tensor]] = {}
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].context))
    device = next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        packed = [_pack(questions[i]) for i in members]
        ids, positions = (
            pad_sequence([row[n] for row in packed], batch_first=True) for n in (0, 1)
        )
        width = ids.shape[1]
        # padding sees itself alone, so that no row of the softmax is empty
        sees = torch.eye(width, dtype=torch.bool).repeat(len(packed), 1, 1)
        for row, (_, _, seen) in zip(sees, packed, strict=True):
            row[: len(seen), : len(seen)] = seen
        first = min(len(questions[i].context) for i in members) - 1
        logits = model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=sees[:, None].to(device),
            use_cache=False,
            logits_to_keep=torch.arange(first, width, device=device),
        ).logits
        for i, row in zip(members, logits, strict=True):
            results[i] = _unpack(questions[i], row[len(questions[i].context) - 1 - first :])
    return [results[i] for i in range(len(questions))]


def _pack(question: Choices) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions, and [query, key] whether the one sees the other."""
    context = len(question.context)
    parts = [question.context, *question.choices]
    part = torch.cat([torch.full((len(ids),), n) for n, ids in enumerate(parts)])
    positions = torch.cat(
        [torch.arange(len(ids)) + (context if n else 0) for n, ids in enumerate(parts)]
    )
    sees = ((part[:, None] == part) | (part == 0)).tril()
    return torch.tensor([t for ids in parts for t in ids]), positions, sees


def _unpack(question: Choices, logits: Tensor) -> list[Tensor]:
    """``logits`` from the context's last token on."""
    result, start = [], 1
    for ids in question.choices:
        # a choice's first token is predicted from the context, the others from the one before
        predicting = torch.cat([logits[:1], logits[start : start + len(ids) - 1]]).float()
        wanted = torch.tensor(ids, device=logits.device)
        result.append(-functional.cross_entropy(predicting, wanted, reduction="none").cpu())
        start += len(ids)
    return result


def _encode(tokenizer: Any, context: str, continuation: str) -> Encoded:
    prompt = tokenizer(context)["input_ids"]
    ids = _continuation(tokenizer, continuation)
    return {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}


def _continuation(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]


def _text(path: Path, tokenizer: Any, windows: int, length: int = 512) -> list[Encoded]:
    """Windows at equal distances."""
    ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    stride = (len(ids) - length) // windows
    parts = [ids[i * stride : i * stride + length] for i in range(windows)]
    return [{"input_ids": part, "labels": [-100, *part[1:]]} for part in parts]
