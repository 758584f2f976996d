"""Training an arm and measuring it: several jobs as one model, on a GPU a step as a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .arms import Job
from .laboratory import Laboratory, digits
from .layers import UpdatedLinear
from .moments import linears
from .prepare import Memo, prepare
from .stacked import Stacked, heads, stack

SCALES = (0.25, 0.5, 0.75, 1.0)  # of the update that is merged
BATCH = 4  # sequences of a step; with general text half of them are it


class Run:
    """Jobs of one arm, task and number of steps: their models as one, its optimizer and step."""

    def __init__(self, jobs: Sequence[Job], lab: Laboratory) -> None:
        self.jobs, self.lab = jobs, lab
        self.arm, self.task = jobs[0].arm, jobs[0].task
        self.half = BATCH // 2 if self.arm.general else BATCH  # the task's sequences in a step
        steps, device = jobs[0].steps, lab.device
        generators = [torch.Generator().manual_seed(1000 + job.seed) for job in jobs]
        memo: Memo = {}
        self.model = stack(
            [prepare(job, lab, g, memo) for job, g in zip(jobs, generators, strict=True)]
        )
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.initial = [p.detach().clone() for p in self.parameters] if self.arm.whole else None
        self.parts = [self.parameters]  # of each job
        if len(jobs) > 1:
            self.parts = [
                [nn.Parameter(p.detach()[i]) for p in self.parameters] for i in range(len(jobs))
            ]
        on_gpu = device.type == "cuda"
        self.rate = torch.zeros(len(jobs), device=device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": part, "lr": rate if on_gpu else 0.0}
                for part, rate in zip(self.parts, self.rate.unbind(0), strict=True)
            ],
            weight_decay=0.0,
            fused=True,
            capturable=on_gpu,
        )
        warm = max(1, steps // 10)
        factors = [min((i + 1) / warm, (steps - i) / (steps - warm + 1)) for i in range(steps)]
        self.rates = torch.tensor([[job.rate * f for job in jobs] for f in factors], device=device)
        # of their own, so that a seed's texts come to every arm in one order
        orders = [self._order(torch.Generator().manual_seed(1000 + job.seed)) for job in jobs]
        self.order = torch.stack(orders, 1).to(device)
        self.step_number = torch.zeros(1, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _order(self, generator: torch.Generator) -> Tensor:
        """The sequences of each step, ``[steps, batch]``: of the task, then of general text."""
        half, steps = self.half, self.jobs[0].steps
        counts = [(len(self.lab.data.ids[f"{self.task}/train"]), half)]
        if self.arm.general:
            counts.append((len(self.lab.data.ids[self.arm.source]), BATCH - half))
        columns = []
        for available, each in counts:
            wanted = each * steps
            drawn = [
                torch.randperm(available, generator=generator)
                for _ in range(math.ceil(wanted / available))
            ]
            columns.append(torch.cat(drawn)[:wanted].view(steps, each))
        return torch.cat(columns, 1)

    def _losses(self) -> list[Tensor]:
        """Of each job's batch."""
        order, half = self.order[self.step_number][0], self.half  # [jobs, batch]
        data, arm, count = self.lab.data, self.arm, len(self.jobs)
        ids = data.ids[f"{self.task}/train"][order[:, :half]]
        labels = data.labels[f"{self.task}/train"][order[:, :half]]
        if arm.general:
            ids = torch.cat([ids, data.ids[arm.source][order[:, half:]]], 1)
            labels = torch.cat([labels, data.labels[arm.source][order[:, half:]]], 1)
        if self.lab.device.type == "cpu":  # a captured step's shapes are fixed, these are not
            end = int((labels != -100).any(1).any(0).nonzero().max()) + 1
            ids, labels = ids[..., :end], labels[..., :end]
        hidden = self.model.model(input_ids=ids.flatten(0, 1), use_cache=False).last_hidden_state
        states = hidden[:, :-1].unflatten(0, (count, -1)).unbind(0)
        before: Sequence[Tensor | None] = [None] * count
        if arm.general == "kl":
            with torch.no_grad():
                base = self.lab.base.model(input_ids=ids[:, half:].flatten(0, 1), use_cache=False)
            before = base.last_hidden_state[:, :-1].unflatten(0, (count, -1))
        return [
            self._loss(*one)
            for one in zip(states, labels[..., 1:], heads(self.model, count), before, strict=True)
        ]

    def _loss(self, states: Tensor, wanted: Tensor, head: Tensor, before: Tensor | None) -> Tensor:
        """Of one job; ``before`` are the base's last hidden states of its general text."""
        arm, half = self.arm, self.half
        kept, own = _predicting(states[:half], wanted[:half])
        loss = _mean(_logits(kept, head), own)
        if arm.general is None:
            return loss
        kept, general = _predicting(states[half:], wanted[half:])
        if arm.general == "replay":
            return loss + arm.general_weight * _mean(_logits(kept, head), general)
        with torch.no_grad():
            expected, _ = _predicting(cast(Tensor, before), wanted[half:])
            (base_head,) = heads(self.lab.base, 1)
            expected = _logits(expected, base_head).log_softmax(-1)
        divergence = functional.kl_div(
            _logits(kept, head).log_softmax(-1), expected, reduction="none", log_target=True
        ).sum(-1)
        labelled = general != -100
        return loss + arm.general_weight * (divergence * labelled).sum() / labelled.sum()

    def _step(self) -> None:
        with torch.autocast(self.lab.device.type, torch.bfloat16, enabled=self.lab.bfloat16):
            losses = self._losses()
        torch.stack(losses).sum().backward()
        if len(self.jobs) > 1:
            for i, part in enumerate(self.parts):
                for own, stacked in zip(part, self.parameters, strict=True):
                    own.grad = cast(Tensor, stacked.grad)[i]
        for part in self.parts:
            nn.utils.clip_grad_norm_(part, 1.0, foreach=True)
        rates = self.rates[self.step_number][0]
        if self.lab.device.type == "cuda":
            self.rate.copy_(rates)
        else:
            for group, rate in zip(self.optimizer.param_groups, rates.tolist(), strict=True):
                group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        for parameter in self.parameters:
            parameter.grad = None
        self.step_number += 1

    def capture(self) -> None:
        """Make the step a CUDA graph; what its rehearsals trained is undone."""
        saved = [p.detach().clone() for p in self.parameters]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self._step()
        with torch.no_grad():
            for parameter, value in zip(self.parameters, saved, strict=True):
                parameter.copy_(value)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        self.step_number.zero_()

    def advance(self) -> None:
        """One step; on a GPU it is only asked for."""
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()

    @torch.no_grad()
    def _merge(self, scale: float, final: list[Tensor]) -> None:
        """So much of the update: of all parameters where all are trained."""
        if self.initial is not None:
            for parameter, start, value in zip(self.parameters, self.initial, final, strict=True):
                parameter.copy_(start + scale * (value - start))
            return
        for module in self.model.modules():
            if isinstance(module, UpdatedLinear):
                module.share = scale
            elif isinstance(module, Stacked):
                module.merge(scale)

    def finish(self) -> list[dict[str, Any]]:
        """The figures of every scale of the update, of each job."""
        if self.graph is not None:
            torch.cuda.synchronize()  # before what still runs is gone
            self.graph = None
        self.optimizer.state.clear()  # of everything in Gemma-3-270M 2 GiB, which looks want
        final = [p.detach().clone() for p in self.parameters]
        looks = []
        for scale in SCALES:
            self._merge(scale, final)
            looks.append(self.lab.look(self.model, self.task, len(self.jobs)))
        measured = zip(*self.lab.measure(looks), strict=True)
        points = [
            [{"scale": scale} | figures for scale, figures in zip(SCALES, own, strict=True)]
            for own in measured
        ]
        shared = {
            "trained": sum(p.numel() for p in self.parameters) // len(self.jobs),
            "before": self.lab.before[self.task],
        }
        predicted = self._predicted_damage()  # by now of the whole update
        if predicted is None:
            return [shared | {"points": own} for own in points]
        return [
            shared | {"points": own, "predicted": digits(damage)}
            for own, damage in zip(points, predicted, strict=True)
        ]

    @torch.no_grad()
    def _predicted_damage(self) -> Tensor | None:
        """``½ sum_j s_j delta_j^T E[x x^T] delta_j`` over all rows of linear layers, by job.

        Row j moves by delta_j; s and x are of the model's samples. None where they are not measured
        for all that is trained: embeddings and norms never are.
        """
        if self.arm.whole:
            return None
        moments, count = self.lab.moments.get("samples"), len(self.jobs)
        damages = torch.zeros(count, device=self.lab.device)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # products with the unit matrix are exact
        try:
            for name, linear in linears(self.lab.base).items():
                layer = self.model.get_submodule(name)
                if not _is_trained(layer):
                    continue
                if moments is None or name not in moments.sensitivity:
                    return None
                unit = torch.eye(linear.in_features, device=self.lab.device)
                weights = layer(unit.repeat(count, 1)).unflatten(0, (count, -1)).mT
                moved = (weights - linear(unit).T) @ moments.vectors[name]
                by_row = (moved.square() * moments.values[name]).sum(-1)
                damages += 0.5 * (by_row * moments.sensitivity[name]).sum(-1)
        finally:
            torch.set_float32_matmul_precision(precision)
        return damages


def _is_trained(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def _predicting(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """``[places, hidden]`` and ``[places]``: all of them, on a CPU those that predict a label."""
    if states.device.type == "cpu":
        return states[wanted != -100], wanted[wanted != -100]
    return states.flatten(0, 1), wanted.flatten()


def _logits(states: Tensor, head: Tensor) -> Tensor:
    return (states @ head.T).float()  # of autocast they come in bfloat16


def _mean(logits: Tensor, wanted: Tensor) -> Tensor:
    return functional.cross_entropy(logits, wanted, reduction="sum") / (wanted != -100).sum()


def trained(jobs: Sequence[Job], lab: Laboratory) -> Run:
    """Jobs of one arm, task and number of steps, trained as one model."""
    run = Run(jobs, lab)
    if lab.device.type == "cuda":
        run.capture()
    for _ in range(jobs[0].steps):
        run.advance()
    return run


def train(jobs: Sequence[Job], lab: Laboratory) -> list[dict[str, Any]]:
    """Their figures."""
    return trained(jobs, lab).finish()
