"""General ability before and after: text, and four sets of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from loki_kernels.demo.evaluation import token_log_probabilities
from loki_kernels.demo.training import Encoded

from . import metrics

_CHOICE_SETS = {"arc_easy": "arc_easy", "piqa": "piqa", "hellaswag": "hellaswag_first2000"}
ACCURACIES = (*_CHOICE_SETS, "lambada")


class Retention:
    """The sets, encoded once: ``rows`` of each set of questions, ``windows`` of 512 tokens."""

    def __init__(self, data: Path, tokenizer: Any, rows: int, windows: int) -> None:
        self.text = _text(data / "text" / "wikitext2_valid.txt", tokenizer, windows)
        self.choices: dict[str, tuple[list[Encoded], list[int], list[int]]] = {}
        for name, file in _CHOICE_SETS.items():
            questions = _first(data / "general" / f"{file}.jsonl", rows)
            prefix = "" if name == "hellaswag" else "\nAnswer:"
            self.choices[name] = (
                [
                    _encode(tokenizer, question["query"].rstrip() + prefix, choice)
                    for question in questions
                    for choice in question["choices"]
                ],
                [len(question["choices"]) for question in questions],
                [question["gold"] for question in questions],
            )
        self.lambada = [
            _encode(tokenizer, row["context"], row["continuation"])
            for row in _first(data / "general" / "lambada_first1500.jsonl", rows)
        ]

    def perplexity(self, model: nn.Module) -> float:
        """On wikitext-2."""
        return metrics.perplexity([p for p, _ in token_log_probabilities(model, self.text, 1)])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity and the accuracies."""
        result = {"perplexity": self.perplexity(model)}
        for name, (rows, counts, gold) in self.choices.items():
            log_p = [p for p, _ in token_log_probabilities(model, rows, 16)]
            result[name] = metrics.choice_accuracy(log_p, counts, gold)
        words = token_log_probabilities(model, self.lambada, 8)
        result["lambada"] = metrics.exact_match([best for _, best in words])
        return result


def _first(path: Path, count: int) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def _encode(tokenizer: Any, context: str, continuation: str) -> Encoded:
    prompt = tokenizer(context)["input_ids"]
    ids = tokenizer(f" {continuation.strip()}", add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}


def _text(path: Path, tokenizer: Any, windows: int, length: int = 512) -> list[Encoded]:
    """Windows at equal distances."""
    ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    stride = (len(ids) - length) // windows
    parts = [ids[i * stride : i * stride + length] for i in range(windows)]
    return [{"input_ids": part, "labels": [-100, *part[1:]]} for part in parts]
