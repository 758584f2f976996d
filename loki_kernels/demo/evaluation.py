"""What was learned of the task, and what changed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..forgetting.measure import compare, record
from ..forgetting.result import summarize
from ..forgetting.texts import read_texts, tokenize
from ..options import DEFAULT_LENGTH
from ..progress import progress_bar
from ..questions import Question
from .training import Encoded, collate


@dataclass(frozen=True)
class Evaluation:
    """One model's figures.

    Attributes:
        exact: share of held-out calls whose every token is the most likely one, given the tokens
            before it (teacher-forced exact match).
        loss: nats a token of those calls.
        kl: of the base's next-token distribution from this model's, nats a token, over general text
            and questions together.
        text_kl, questions_kl: of either.
        text_perplexity, questions_perplexity: of either.
    """

    exact: float
    loss: float
    kl: float
    text_kl: float
    questions_kl: float
    text_perplexity: float
    questions_perplexity: float


class Examination:
    """The task's held-out calls, and the base's distributions on general text and questions."""

    def __init__(
        self,
        base: nn.Module,
        tokenizer: Any,
        task: Sequence[Encoded],
        text: Sequence[Encoded],
        questions: Sequence[Question],
        *,
        progress: bool | None = None,
    ) -> None:
        general: list[dict[str, Any]] = [
            {"input_ids": window["input_ids"], "domain": "text"} for window in text
        ]
        for question in questions:
            answer = {"role": "assistant", "content": question.choices[question.answer]}
            asked = {"role": "user", "content": question.text()}
            general.append({"messages": [asked, answer], "domain": "questions"})
        self._corpus = tokenize(read_texts(general), tokenizer, DEFAULT_LENGTH, None)
        self._tokenizer, self._task, self._progress = tokenizer, task, progress
        self._base = record(base, self._corpus, kept=True, progress=progress)

    def evaluate(self, model: nn.Module, label: str = "evaluate") -> Evaluation:
        """Measure one model."""
        calls = token_log_probabilities(model, self._task, 8, label, self._progress)
        moves = compare(self._base, model, progress=self._progress)
        drift = summarize(self._corpus, moves, ("", ""), self._tokenizer)
        groups = {group.name: group for group in drift.domains}
        return Evaluation(
            exact=sum(bool(best.all()) for _, best in calls) / len(calls),
            loss=-float(torch.cat([log_p for log_p, _ in calls]).mean()),
            kl=drift.overall.kl,
            text_kl=groups["text"].kl,
            questions_kl=groups["questions"].kl,
            text_perplexity=groups["text"].perplexity_after,
            questions_perplexity=groups["questions"].perplexity_after,
        )


def labelled_logits(model: nn.Module, examples: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Float32 logits ``[B, P, V]`` and labels ``[B, P]`` at the P positions that predict a label.

    The head sees no other position: prompts are long, answers short, and the vocabulary large.
    """
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate(examples).items()}
    labels = batch.pop("labels")[:, 1:]
    kept = (labels != -100).any(0).nonzero().squeeze(1)
    logits = model(**batch, use_cache=False, logits_to_keep=kept).logits
    return logits.float(), labels[:, kept]


@torch.no_grad()
def token_log_probabilities(
    model: nn.Module,
    examples: Sequence[Encoded],
    batch_size: int,
    label: str = "evaluate",
    progress: bool | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """(log-probability, whether it is the most likely) of every labelled token, a pair a row."""
    results: dict[int, tuple[Tensor, Tensor]] = {}
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    with progress_bar(len(examples), label, progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            logits, labels = labelled_logits(model, [examples[i] for i in members])
            for i, row_logits, row_labels in zip(members, logits, labels, strict=True):
                kept = row_labels != -100
                wanted = row_labels[kept]
                log_p = functional.log_softmax(row_logits[kept], -1)
                best = log_p.argmax(-1) == wanted
                results[i] = (log_p.gather(1, wanted[:, None]).squeeze(1).cpu(), best.cpu())
            bar.update(len(members))
    return [results[i] for i in range(len(examples))]


def general_text(tokenizer: Any, windows: int, length: int) -> list[Encoded]:
    """Windows of the Python language reference that every Python carries as help topics."""
    from pydoc_data.topics import topics

    return windows_of("\n".join(topics[key] for key in sorted(topics)), tokenizer, windows, length)


def windows_of(text: str, tokenizer: Any, windows: int, length: int) -> list[Encoded]:
    """Windows of ``length`` tokens at equal distances."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    stride = (len(ids) - length) // windows
    parts = [ids[i * stride : i * stride + length] for i in range(windows)]
    return [{"input_ids": part, "labels": [-100, *part[1:]]} for part in parts]
