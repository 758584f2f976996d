"""How far the selection depends on the questions, the path's points, the definition and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import loki_kernels as loki
from loki_kernels import Attribution
from loki_kernels.questions import Question, read_questions

QUOTA = 10.0
CRITERIA = ("signed", "magnitude")
BLOCK = 5  # MMLU questions a subject in one piece
_PER_SUBJECT = (1, 3, 10, 50)


def mmlu(data: Path, first: int, count: int) -> list[Question]:
    """Questions ``first`` to ``first + count - 1`` of each subject's test set."""
    files = sorted((data / "mmlu" / "test").glob("*.csv"))
    return [q for file in files for q in read_questions(file)[first : first + count]]


def selection(scores: torch.Tensor, criterion: str) -> loki.RowSelection:
    """`loki.select` at the study's quota."""
    return loki.select(scores, QUOTA, criterion=criterion)  # type: ignore[arg-type]


def overlaps(ours: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Share of rows two sets of scores have in common, by criterion."""
    return {c: selection(ours, c).overlap(selection(other, c)) for c in CRITERIA}


def by_questions(blocks: Sequence[Attribution]) -> dict[str, dict[str, float]]:
    """Overlap of n questions a subject with all of them, and of disjoint halves of 2n."""
    # [subject, question of the subject, layer, node]: a block holds its questions by subject
    shaped = [b.scores.reshape(-1, BLOCK, *b.scores.shape[1:]) for b in blocks]
    scores = torch.cat(shaped, 1)
    result = {}
    for count in (n for n in _PER_SUBJECT if n <= scores.shape[1]):
        part = scores[:, :count].flatten(0, 1)
        figures = {f"{c} with all": v for c, v in overlaps(part, scores.flatten(0, 1)).items()}
        if 2 * count <= scores.shape[1]:
            other = scores[:, count : 2 * count].flatten(0, 1)
            figures |= {f"{c} with others": v for c, v in overlaps(part, other).items()}
        result[str(count)] = figures
    return result


def by_steps(attribute: Callable[..., Attribution]) -> dict[str, dict[str, float]]:
    """Overlap of m = 7 and 20 with m = 50, and how far the scores are from adding up."""
    runs = {m: attribute(steps=m) for m in (7, 20, 50)}
    return {
        str(m): overlaps(run.scores, runs[50].scores)
        | {"completeness": float(run.completeness.abs().mean())}
        for m, run in runs.items()
    }


def by_definition(attribute: Callable[..., Attribution]) -> dict[str, dict[str, float]]:
    """Overlap of each two definitions."""
    names = ("published", "paper", "captum")
    runs = {name: attribute(definition=name) for name in names}
    return {
        f"{a}, {b}": overlaps(runs[a].scores, runs[b].scores)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def by_dtype(attribute: Callable[..., Attribution], model: Any) -> dict[str, dict[str, float]]:
    """Overlap of float32 with bfloat16, with its own and with float32's predicted tokens."""
    full = attribute()
    half = model.to(torch.bfloat16)
    own = attribute(model=half)
    same = attribute(model=half, target=full.targets)
    return {
        "own tokens": overlaps(full.scores, own.scores)
        | {"same token": float((full.targets == own.targets).float().mean())},
        "float32's tokens": overlaps(full.scores, same.scores),
    }
