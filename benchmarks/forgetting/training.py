"""Learning one task or several in a row, and what was learned and forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from loki_kernels.demo.evaluation import labelled_logits
from loki_kernels.demo.training import Encoded

from .methods import Method, prepare
from .precision import autocast
from .study import Stage, Training
from .tasks import group_by_length
from .workshop import Workshop


def train(
    shop: Workshop,
    lessons: Sequence[tuple[Stage, float]],
    method: Method,
    seed: int,
    sweep: bool,
) -> dict[str, Any]:
    """Learn one task after the other, each with its learning rate.

    For a sweep score the last one's validation fold, else its test fold at every checkpoint, and
    at the end the earlier tasks' and what was forgotten.
    """
    attribution = shop.attribution(method.definition) if method.kind == "rows" else None
    model, parameters = prepare(shop.model(), method, attribution, seed)
    curve = []
    for number, (stage, rate) in enumerate(lessons, 1):
        task = shop.task(stage.task, seed)
        records = group_by_length(task.train, stage.training.batch_size, seed)
        for step, loss in train_steps(model, parameters, records, stage.training, rate):
            if number < len(lessons):
                continue
            point: dict[str, Any] = {"step": step, "train_loss": loss}
            if not sweep:
                point |= task.score(model, task.test)
                if step < stage.training.steps:
                    point["perplexity"] = shop.retention.perplexity(model)
            curve.append(point)
    figures: dict[str, Any] = {"trained": sum(p.numel() for p in parameters), "curve": curve}
    if sweep:
        return figures | {"validation": task.score(model, task.validation)}
    retention = shop.retention.evaluate(model)
    curve[-1]["perplexity"] = retention["perplexity"]
    earlier = {}
    for stage, _ in lessons[:-1]:
        task = shop.task(stage.task, seed)
        earlier[stage.task] = task.score(model, task.test)
    return figures | {"earlier": earlier, "retention": retention}


def train_steps(
    model: nn.Module,
    parameters: list[nn.Parameter],
    records: list[Encoded],
    training: Training,
    rate: float,
) -> Iterator[tuple[int, float]]:
    """AdamW without weight decay, gradients clipped at 1, a tenth of the steps to warm up, then
    linear decay. Yields (step, mean loss since the last) at each checkpoint."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    warm = max(1, training.steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warm, (training.steps - step) / (training.steps - warm + 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses: list[float] = []
    for step in range(training.steps):
        first = step * training.batch_size
        batch = [records[i % len(records)] for i in range(first, first + training.batch_size)]
        model.train()
        with autocast():
            logits, labels = labelled_logits(model, batch)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step + 1 in training.checkpoints:
            model.eval()
            yield step + 1, sum(losses) / len(losses)
            losses.clear()
    model.eval()
