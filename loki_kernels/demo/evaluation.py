"""Task score and what was forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..progress import progress_bar
from ..questions import Question
from .training import Encoded, collate


@dataclass(frozen=True)
class Evaluation:
    """One model's figures.

    Attributes:
        task_exact: share of held-out calls whose every token is the most likely one, given the
            tokens before it (teacher-forced exact match).
        task_loss: nats a token of those calls.
        perplexity: on general text.
        answer_log_probability: mean nats a token of the right answer of general questions.
    """

    task_exact: float
    task_loss: float
    perplexity: float
    answer_log_probability: float


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


def general_text(tokenizer: Any, windows: int, length: int = 512) -> list[Encoded]:
    """Windows of the Python language reference that every Python carries as help topics."""
    from pydoc_data.topics import topics

    ids = tokenizer("\n".join(topics[key] for key in sorted(topics)), verbose=False)["input_ids"]
    stride = (len(ids) - length) // windows
    parts = [ids[i * stride : i * stride + length] for i in range(windows)]
    return [{"input_ids": part, "labels": [-100, *part[1:]]} for part in parts]


def question_examples(tokenizer: Any, questions: Sequence[Question]) -> list[Encoded]:
    """Question and right answer, labelled on the answer."""
    examples = []
    for question in questions:
        prompt = tokenizer(f"Question: {question.question}\nAnswer:")["input_ids"]
        answer = tokenizer(f" {question.choices[question.answer]}", add_special_tokens=False)
        ids = answer["input_ids"]
        examples.append({"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids})
    return examples


def evaluate(
    model: nn.Module,
    task: Sequence[Encoded],
    text: Sequence[Encoded],
    questions: Sequence[Encoded],
    *,
    label: str = "evaluate",
    progress: bool | None = None,
) -> Evaluation:
    """Measure one model on the three sets."""

    def run(examples: Sequence[Encoded], name: str, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        return token_log_probabilities(model, examples, batch_size, f"{label}: {name}", progress)

    calls = run(task, "task", 8)
    task_tokens = torch.cat([log_p for log_p, _ in calls])
    text_tokens = torch.cat([log_p for log_p, _ in run(text, "general text", 1)])
    answers = [log_p.mean() for log_p, _ in run(questions, "general questions", 8)]
    return Evaluation(
        task_exact=sum(bool(best.all()) for _, best in calls) / len(calls),
        task_loss=-float(task_tokens.mean()),
        perplexity=math.exp(-float(text_tokens.mean())),
        answer_log_probability=float(torch.stack(answers).mean()),
    )
